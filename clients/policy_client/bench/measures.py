"""From what became of every observation to the figures of a result. Pure: no clock, no socket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy_client.bench.distribution import Distribution, encode, make_histogram
from policy_client.bench.result import SCHEMA, Result, Test

SLICES = 40  # enough to resample for intervals, each long enough to hold what belongs together


@dataclass(frozen=True, eq=False)
class Fates:
    """What became of N observations, in no order. Times are seconds since the test began.

    Attributes:
        robot: Whose it was, (N,).
        due_s: When it should have been sent, (N,).
        sent_s: When it was, (N,).
        received_s: When it was answered, (N,); NaN for never.
        superseded: Whether it was answered by a newer one's chunk, (N,).
        horizon: How many actions the chunk holds, (N,).
        stages_ms: Where the server says that the time went, (N,) each; NaN where it does not say.
        failures: Of those never answered, how many failed in which way.
    """

    robot: NDArray[np.int64]
    due_s: NDArray[np.float64]
    sent_s: NDArray[np.float64]
    received_s: NDArray[np.float64]
    superseded: NDArray[np.bool_]
    horizon: NDArray[np.int64]
    stages_ms: Mapping[str, NDArray[np.float64]]
    failures: Mapping[str, int]

    @classmethod
    def of(cls, parts: Sequence[Mapping[str, Any]]) -> Fates:
        """Put together what several processes logged."""
        stages = dict.fromkeys(stage for part in parts for stage in part["stages_ms"])  # in the order of the server
        failures: dict[str, int] = {}
        for part in parts:
            for name, count in part["failures"].items():
                failures[name] = failures.get(name, 0) + count
        columns = ("robot", "due_s", "sent_s", "received_s", "superseded", "horizon")
        return cls(
            **{name: np.concatenate([part[name] for part in parts]) for name in columns},
            stages_ms={
                stage: np.concatenate(
                    [part["stages_ms"].get(stage, np.full(len(part["robot"]), np.nan)) for part in parts]
                )
                for stage in stages
            },
            failures=failures,
        )

    @property
    def latency_ms(self) -> NDArray[np.float64]:
        """From when it was due to the answer, (N,); NaN for never."""
        return 1e3 * (self.received_s - self.due_s)


def summarise(fates: Fates, test: Test, *, made_at: str, command: str, machine: Mapping[str, str]) -> Result:
    """Return the result of a test."""
    latency_ms = fates.latency_ms
    came = np.isfinite(latency_ms)
    per_robot = [_in_order(fates, robot) for robot in np.unique(fates.robot)]
    ages_ms, starved = _chunk_ages(per_robot, test)
    return Result(
        schema=SCHEMA,
        made_at=made_at,
        command=command,
        machine=machine,
        test=test,
        asked=len(latency_ms),
        answered=int(came.sum()),
        superseded=int(fates.superseded.sum()),
        failures=fates.failures,
        missed=int(len(latency_ms) - np.sum(latency_ms[came] <= test.deadline_ms)),
        latency=Distribution.of(latency_ms[came], never=int(np.sum(~came))),
        lateness=Distribution.of(1e3 * (fates.sent_s - fates.due_s)),
        jitter=Distribution.of(np.concatenate([np.zeros(0), *map(_jitter_ms, per_robot)])),
        chunk_age=Distribution.of(ages_ms),
        starved=starved,
        stages=_stages(fates),
        slices=tuple(encode(histogram) for histogram in _slices(fates, test.seconds)),
    )


@dataclass(frozen=True, eq=False)
class _Answers:
    """The answered observations of one robot, in the order in which they were due."""

    due_s: NDArray[np.float64]
    received_s: NDArray[np.float64]
    horizon: NDArray[np.int64]


def _in_order(fates: Fates, robot: int) -> _Answers:
    rows = np.flatnonzero((fates.robot == robot) & np.isfinite(fates.received_s) & ~fates.superseded)
    rows = rows[np.argsort(fates.due_s[rows], kind="stable")]
    return _Answers(fates.due_s[rows], fates.received_s[rows], fates.horizon[rows])


def _jitter_ms(answers: _Answers) -> NDArray[np.float64]:
    return 1e3 * np.abs(np.diff(answers.received_s) - np.diff(answers.due_s))


def _chunk_ages(robots: Iterable[_Answers], test: Test) -> tuple[NDArray[np.float64], float]:
    """Return how old what robots act on is at each step of their control loops, and the share of steps without actions.

    A robot acts from its first chunk on, each `step_s`, on the newest of the chunks that have come.
    """
    ages_s: list[NDArray[np.float64]] = [np.zeros(0)]
    spans_s: list[NDArray[np.float64]] = [np.zeros(0)]
    for answers in robots:
        if not len(answers.due_s):
            continue
        by_arrival = np.argsort(answers.received_s, kind="stable")
        arrived_s = answers.received_s[by_arrival]
        newest = np.maximum.accumulate(by_arrival)  # rows are in the order in which observations were due
        steps_s: NDArray[np.float64] = np.arange(arrived_s[0], test.seconds, test.step_s, dtype=np.float64)
        playing = newest[np.searchsorted(arrived_s, steps_s, side="right") - 1]
        ages_s.append(steps_s - answers.due_s[playing])
        spans_s.append(test.step_s * answers.horizon[playing].astype(np.float64))
    ages, spans = np.concatenate(ages_s), np.concatenate(spans_s)
    return 1e3 * ages, float(np.mean(ages >= spans)) if len(ages) else 1.0


def _stages(fates: Fates) -> dict[str, Distribution]:
    """Return the server's stages of the answers that name them all, and what of their latency lies outside."""
    if not fates.stages_ms:
        return {}
    told = np.isfinite(np.stack([*fates.stages_ms.values(), fates.latency_ms])).all(axis=0)
    stages_ms = {name: values[told] for name, values in fates.stages_ms.items()}
    outside_ms = fates.latency_ms[told] - np.sum(list(stages_ms.values()), axis=0)
    return {name: Distribution.of(values) for name, values in {**stages_ms, "outside": outside_ms}.items()}


def _slices(fates: Fates, seconds: float) -> list[Any]:
    number = np.minimum((fates.due_s * SLICES / seconds).astype(np.int64), SLICES - 1)
    latency_ms = fates.latency_ms
    histograms = []
    for i in range(SLICES):
        mine = latency_ms[number == i]
        came = np.isfinite(mine)
        histograms.append(make_histogram(mine[came], never=int(np.sum(~came))))
    return histograms
