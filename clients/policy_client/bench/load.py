"""A load test from beginning to end: processes that play robots, begun together, and what they logged."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from policy_client.bench.arrivals import Arrivals
from policy_client.bench.doors import Target
from policy_client.bench.measures import Fates, summarise
from policy_client.bench.result import Result, Test
from policy_client.bench.served import ServedPolicy
from policy_client.bench.worker import Work, run_worker
from policy_client.codec import unpack
from policy_client.errors import PolicyClientError

MOST_PER_PROCESS = 200  # robots; select takes 1024 file descriptors
_START_S = 120.0  # for all robots to connect and warm up
_HEAD_START_S = 0.2  # for the word to begin to reach all processes

Progress = Callable[[int, int], None]  # observations sent, and settled, so far


class LoadFailed(PolicyClientError):
    """The robots could not be started, or a process of theirs died. The message says why."""


@dataclass(frozen=True)
class Load:
    """What to test.

    Attributes:
        target: Which policy is asked, and where.
        door: By which protocol; a key of `DOORS`.
        policy: What the server says of it.
        robots: How many.
        arrivals: When each sends.
        pattern: The same in words.
        seconds: How long.
        deadline_ms: By when an answer has to be there.
        seed: Decides observations and arrivals.
        processes: How many processes play the robots.
        command: What repeats the test.
    """

    target: Target
    door: str
    policy: ServedPolicy
    robots: int
    arrivals: Arrivals
    pattern: str
    seconds: float
    deadline_ms: float
    seed: int = 0
    processes: int = 1
    command: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.robots < 1 or self.processes < 1 or not self.seconds > 0 or not self.deadline_ms > 0:
            raise ValueError(
                "a test needs at least one robot, one process, some time and a deadline, "
                f"got {self.robots}, {self.processes}, {self.seconds} s and {self.deadline_ms} ms"
            )

    def with_robots(self, robots: int) -> Load:
        """Return the same test with another number of robots."""
        return replace(self, robots=robots)


def run_load(load: Load, progress: Progress = lambda sent, settled: None) -> Result:
    """Test, and return what came out.

    Raises:
        LoadFailed: Robots could not connect, were refused while they warmed up, or their process died.
    """
    processes = min(load.robots, max(load.processes, -(-load.robots // MOST_PER_PROCESS)))
    shares = [tuple(range(i, load.robots, processes)) for i in range(processes)]
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    with _workers([_work(load, share) for share in shares]) as parents:
        _all_say(parents, "ready")
        begin_s = time.monotonic() + _HEAD_START_S
        for parent in parents:
            parent.send_bytes(repr(begin_s).encode())
        logs = _collect(parents, progress)
    test = Test(
        url=load.target.url,
        door=load.door,
        policy=load.policy.name,
        version=load.policy.version,
        engine=load.policy.engine,
        arrivals=load.pattern,
        robots=load.robots,
        rate_hz=load.arrivals.rate_at(load.seconds),
        seconds=load.seconds,
        deadline_ms=load.deadline_ms,
        step_s=load.target.step_s,
        seed=load.seed,
        processes=processes,
    )
    return summarise(Fates.of(logs), test, made_at=made_at, command=load.command, machine=_machine())


def _work(load: Load, robots: tuple[int, ...]) -> Work:
    return Work(load.target, load.door, load.policy, robots, load.arrivals, load.seconds, load.seed)


@contextmanager
def _workers(works: list[Work]) -> Iterator[list[Connection]]:
    # Spawned and not forked: a fork would take along threads' locks, and on macOS it is not safe at all.
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    parents: list[Connection] = []
    try:
        for work in works:
            parent, child = context.Pipe()
            process = context.Process(target=run_worker, args=(work, child), daemon=True)
            process.start()
            child.close()  # so that the death of the process ends the pipe
            processes.append(process)
            parents.append(parent)
        yield parents
        for process in processes:
            process.join(5.0)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        for parent in parents:
            parent.close()


def _all_say(parents: list[Connection], word: str) -> None:
    ends_at_s = time.monotonic() + _START_S
    for parent in parents:
        if not parent.poll(max(0.0, ends_at_s - time.monotonic())):
            raise LoadFailed(f"robots were not {word} within {_START_S:g} s")
        _read(parent)


def _collect(parents: list[Connection], progress: Progress) -> list[dict[str, Any]]:
    sent, settled = [0] * len(parents), [0] * len(parents)
    logs: dict[int, dict[str, Any]] = {}
    while len(logs) < len(parents):
        for ready in wait([parent for i, parent in enumerate(parents) if i not in logs]):
            i = next(i for i, parent in enumerate(parents) if parent is ready)
            said = _read(parents[i])
            if "done" in said:
                logs[i] = said["done"]
            else:
                sent[i], settled[i] = said["sent"], said["settled"]
        progress(sum(sent), sum(settled))
    return [logs[i] for i in range(len(parents))]


def _read(parent: Connection) -> dict[str, Any]:
    try:
        said = unpack(parent.recv_bytes())
    except EOFError as error:
        raise LoadFailed("a process that played robots died") from error
    if not isinstance(said, dict):
        raise LoadFailed(f"a process that played robots said {said!r:.80}, expected a map")
    if "error" in said:
        raise LoadFailed(str(said["error"]))
    return said


def _machine() -> dict[str, str]:
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
    }
