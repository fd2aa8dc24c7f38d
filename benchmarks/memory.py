"""What a server holds while it runs: memory and open files, looked up in /proc every now and then."""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Sample:
    """What a process held at one moment.

    Attributes:
        at_s: When, from any origin.
        resident_bytes: Memory of it that is in RAM.
        files: Files and sockets that it has open.
    """

    at_s: float
    resident_bytes: int
    files: int


def look_at(process_id: int, at_s: float) -> Sample:
    """Return what a process holds now; raises FileNotFoundError if it has ended."""
    process = Path(f"/proc/{process_id}")
    pages = int((process / "statm").read_text(encoding="ascii").split()[1])
    return Sample(at_s, pages * os.sysconf("SC_PAGE_SIZE"), sum(1 for _ in (process / "fd").iterdir()))


def growth(samples: Sequence[Sample], *, warm_up_s: float) -> float:
    """Return the resident memory of the last third, as a multiple of what it was after the warm-up.

    Medians of both: of the last third, and of as long a time at most after the warm-up.

    Raises:
        ValueError: Nothing was looked at after the warm-up and before the last third.
    """
    if not samples:
        raise ValueError("the process was never looked at")
    begin_s, end_s = samples[0].at_s, samples[-1].at_s
    third_s = (end_s - begin_s) / 3
    after_s = begin_s + warm_up_s
    last = [sample.resident_bytes for sample in samples if sample.at_s >= end_s - third_s]
    first = [
        sample.resident_bytes for sample in samples if after_s <= sample.at_s < min(after_s + third_s, end_s - third_s)
    ]
    if not first:
        raise ValueError(f"the run of {end_s - begin_s:.0f} s is too short for a warm-up of {warm_up_s:.0f} s")
    return float(np.median(last) / np.median(first))


class MemoryWatch:
    """Looks at a process in a thread of its own, for as long as its context lasts.

    Attributes:
        samples: What it saw.
    """

    def __init__(self, process_id: int, *, every_s: float) -> None:
        self.samples: list[Sample] = []
        self._process_id = process_id
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self.samples.append(look_at(self._process_id, time.monotonic()))
            except FileNotFoundError:  # it has ended; whoever watches learns that elsewhere
                return
