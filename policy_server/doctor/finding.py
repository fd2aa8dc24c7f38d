"""What a check found."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["ok", "note", "warning", "problem"]
LEVELS: tuple[Level, ...] = get_args(Level)  # from best to worst


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        subject: What was looked at, such as "machine".
        level: "ok"; "note", to know of; "warning", it works but not as well as it could; "problem", something fails.
        what: What was found, in one line.
        do: What to do about it; empty if nothing needs doing.
    """

    subject: str
    level: Level
    what: str
    do: str = ""


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level among findings; "ok" if there are none."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")
