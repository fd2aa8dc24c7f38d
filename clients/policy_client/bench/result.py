"""What a load test leaves behind: a JSON file with a schema of its own, which `policy-bench schema` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from policy_client.bench.distribution import Distribution

SCHEMA = 1


@dataclass(frozen=True)
class Test:
    """What was done.

    Attributes:
        url: The server.
        door: By which protocol it was asked.
        policy: Name of the policy.
        version: Version of the policy.
        engine: What computed it.
        arrivals: When robots sent, as the command line says it.
        robots: How many.
        rate_hz: How many observations a second each of them sent, on average.
        seconds: How long.
        deadline_ms: By when an answer had to be there.
        step_s: Time between two actions of a chunk.
        seed: Decides observations and arrivals.
        processes: How many processes played the robots.
    """

    url: str
    door: str
    policy: str
    version: str
    engine: str
    arrivals: str
    robots: int
    rate_hz: float
    seconds: float
    deadline_ms: float
    step_s: float
    seed: int
    processes: int


@dataclass(frozen=True)
class Result:
    """What became of it. All times of answers count from when an observation was due, not from when it was sent.

    Attributes:
        schema: Version of this format.
        made_at: When the test began, ISO 8601.
        command: What repeats it.
        machine: What the robots ran on, in words, by topic.
        test: What was done.
        asked: Observations that were due.
        answered: How many of them were answered, by a chunk of their own or of a newer one.
        superseded: How many of those by a newer one's.
        failures: Of the others, how many failed in which way.
        missed: How many were not answered by the deadline.
        latency: From when an observation was due to its answer; what never came counts as never.
        lateness: From when an observation was due to its sending: the test's own delay, part of the latency.
        jitter: By how much the pause between two answers differs from that between their observations.
        chunk_age: At every step of every robot's control loop, the age of what its newest chunk answers.
        starved: Share of those steps at which the newest chunk had run out of actions.
        stages: Where the server says that the time went, of those answers that say it; `outside` is all the rest.
        slices: Histograms of the latency in equal slices of the test, in order.
    """

    schema: int
    made_at: str
    command: str
    machine: Mapping[str, str]
    test: Test
    asked: int
    answered: int
    superseded: int
    failures: Mapping[str, int]
    missed: int
    latency: Distribution
    lateness: Distribution
    jitter: Distribution
    chunk_age: Distribution
    starved: float
    stages: Mapping[str, Distribution]
    slices: tuple[str, ...]

    @property
    def missed_share(self) -> float:
        """Share of the observations that were not answered by the deadline."""
        return self.missed / self.asked if self.asked else 0.0

    @property
    def answers_per_s(self) -> float:
        """Answered observations a second."""
        return self.answered / self.test.seconds


def save_result(path: Path, result: Result) -> None:
    """Write a result as JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def load_result(path: Path) -> Result:
    """Read what `save_result` wrote.

    Raises:
        ValueError: It is something else, or of another schema.
    """
    raw = path.read_bytes()
    try:
        found = msgspec.json.decode(raw, type=_Versioned).schema
        if found != SCHEMA:
            raise ValueError(f"{path} has schema {found}, expected {SCHEMA}; measure again with this policy-bench")
        return msgspec.json.decode(raw, type=Result)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is no result of policy-bench: {error}") from error


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the file."""
    return {**msgspec.json.schema(Result), "title": "policy-bench result", "description": f"Schema {SCHEMA}."}


@dataclass(frozen=True)
class _Versioned:
    schema: int
