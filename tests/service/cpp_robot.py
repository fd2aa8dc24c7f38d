"""The C++ client's `conversation` program, led by the hand."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.service.scripted_door import PATIENCE_S


@dataclass
class Robot:
    """A C++ robot on a leash: `conversation`, told what to do line by line."""

    process: subprocess.Popen[str]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        if failure:
            self.process.kill()
        errors = self.process.communicate(timeout=PATIENCE_S)[1]  # the end of its input ends it; then leaks are told
        assert failure or self.process.returncode == 0, f"the robot ended with {self.process.returncode}:\n{errors}"

    def ask(self, command: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline() or self._failure())

    def wait_for(self, command: str, **wanted: Any) -> dict[str, Any]:
        """Ask until the answer holds what is wanted."""
        until_s = time.monotonic() + PATIENCE_S
        while True:
            answer = self.ask(command)
            if answer and wanted.items() <= answer.items():
                return answer
            assert time.monotonic() < until_s, f"{command} says {answer}, expected {wanted}"
            time.sleep(0.02)

    def quit(self) -> float:
        """End it in good order, and return how many milliseconds the stream took to end."""
        ended_in_ms: float = self.ask("quit")["ended_in_ms"]
        assert self.process.wait(PATIENCE_S) == 0, self._failure()
        return ended_in_ms

    def _failure(self) -> str:
        raise AssertionError(f"the robot ended with {self.process.wait()}:\n{self.process.communicate()[1]}")


@contextmanager
def leashed(built: Path, port: int, **options: object) -> Iterator[Robot]:
    words = [str(word) for option in {"port": port, "policy": "tiny", **options}.items() for word in option]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Robot(subprocess.Popen([built / "conversation", *words], text=True, **pipes)) as robot:
        yield robot
