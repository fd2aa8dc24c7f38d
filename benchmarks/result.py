"""What a benchmark leaves behind, and the JSON file that keeps it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1

# A distribution is kept as its quantiles at these percentages: enough to draw it, and to look up any that is quoted.
PERCENTS = (*(i / 2 for i in range(200)), 99.9, 100.0)

# In JSON, a list of numbers belongs on one line.
_NUMBER_LINES = re.compile(r"\n +(?=[\d\]])")


@dataclass(frozen=True)
class Series:
    """The latencies of one contender under one condition.

    Attributes:
        panel: The condition, such as "16 clients".
        label: The contender.
        role: "ours", "peer", or "reference" for a yardstick that is no rival.
        count: How many latencies were measured.
        quantiles_ms: Their quantiles at `PERCENTS`.
    """

    panel: str
    label: str
    role: str
    count: int
    quantiles_ms: tuple[float, ...]

    @classmethod
    def of(cls, panel: str, label: str, role: str, latencies_ms: Sequence[float] | np.ndarray) -> "Series":
        """Summarise measured latencies."""
        quantiles = np.percentile(latencies_ms, PERCENTS)
        return cls(panel, label, role, len(latencies_ms), tuple(float(f"{q:.4g}") for q in quantiles))

    def p(self, percent: float) -> float:
        """Return the latency, in ms, that `percent` of all stayed below."""
        return self.quantiles_ms[PERCENTS.index(percent)]


@dataclass(frozen=True)
class Curve:
    """One contender's figure over a quantity.

    Attributes:
        panel: What the figure is.
        label: The contender.
        across: The quantity.
        points: Quantity, figure, and both ends of the figure's 95 % interval, in order of the quantity.
    """

    panel: str
    label: str
    across: str
    points: tuple[tuple[float, float, float, float], ...]


def ms(value: float) -> str:
    """Return a time as tables and pictures print it, without its unit."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


@dataclass(frozen=True)
class Bar:
    """What a figure had to be, and what it was."""

    claim: str
    got: str
    met: bool


@dataclass(frozen=True)
class Result:
    """One benchmark's outcome.

    Attributes:
        name: The benchmark's name.
        machine: What it ran on, in words, by topic.
        command: What repeats it.
        columns: Head of its table.
        rows: The table, as it is printed.
        series: What is drawn.
        bars: What had to be reached.
        facts: Circumstances of this run, in words, by topic.
        curves: What is drawn if there are no series.
    """

    name: str
    machine: Mapping[str, str]
    command: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    series: tuple[Series, ...]
    bars: tuple[Bar, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()


def table_lines(result: Result) -> list[str]:
    """Return a result as lines for a terminal: its table, what is to be known about it, and its bars."""
    rows = [result.columns, *result.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(result.columns))]
    table = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    facts = [f"{topic}: {text}" for topic, text in result.facts.items()]
    return [*table, *facts, *(f"{'reached' if bar.met else 'MISSED '}  {bar.claim}: {bar.got}" for bar in result.bars)]


def save_results(path: Path, results: Mapping[str, Result]) -> None:
    """Write the results of all benchmarks."""
    whole = {"schema": SCHEMA, "percents": PERCENTS, "results": {name: asdict(r) for name, r in results.items()}}
    path.write_text(_NUMBER_LINES.sub(r" ", json.dumps(whole, indent=1)) + "\n", encoding="utf-8")


def load_results(path: Path) -> dict[str, Result]:
    """Read what `save_results` wrote; raises ValueError for another schema. A missing file holds no results."""
    if not path.exists():
        return {}
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw.get("schema") != SCHEMA or raw.get("percents") != list(PERCENTS):
        raise ValueError(f"{path} has schema {raw.get('schema')!r}, expected {SCHEMA}; delete it and measure again")
    return {name: _read_result(value) for name, value in raw["results"].items()}


def _read_result(raw: dict[str, Any]) -> Result:
    return Result(
        name=raw["name"],
        machine=raw["machine"],
        command=raw["command"],
        columns=tuple(raw["columns"]),
        rows=tuple(tuple(row) for row in raw["rows"]),
        series=tuple(Series(**{**s, "quantiles_ms": tuple(s["quantiles_ms"])}) for s in raw["series"]),
        bars=tuple(Bar(**bar) for bar in raw["bars"]),
        facts=raw["facts"],
        curves=tuple(Curve(**{**c, "points": tuple(map(tuple, c["points"]))}) for c in raw.get("curves", ())),
    )
