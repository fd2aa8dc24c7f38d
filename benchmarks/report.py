"""Writes docs/benchmarks.md and its pictures from results; nothing is measured here."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

from benchmarks.curves import plot_curves
from benchmarks.plot import plot_result
from benchmarks.result import Result
from benchmarks.settings import OPENPI_VARIABLE

_HEAD = f"""\
# Benchmarks

Written by `python -m benchmarks`; do not edit. `make bench` measures everything again and rewrites this page, its
pictures, and [benchmarks/results.json](../benchmarks/results.json), from which `python -m benchmarks --report-only`
makes the page without measuring. openpi's own server takes part when `{OPENPI_VARIABLE}` names a checkout of it.

Absolute times belong to the machine named in each section, and move by a factor of two or three on shared machines.
Ratios were measured in turns on the same machine within the same minutes: trust those. Brackets hold 95 % intervals.

"""


def write_report(results: Mapping[str, Result], benchmarks: Mapping[str, ModuleType], folder: Path) -> None:
    """Write `benchmarks.md` and `images/bench-*.png` into `folder`.

    Args:
        results: By name; those missing are left out.
        benchmarks: The modules; the docstring of each says what it measures.
        folder: The documentation's folder.
    """
    measured = [results[name] for name in benchmarks if name in results]
    sections = [_section(result, benchmarks[result.name], folder) for result in measured]
    (folder / "benchmarks.md").write_text(_HEAD + _bars(measured) + "\n" + "\n".join(sections), encoding="utf-8")


def _bars(results: Iterable[Result]) -> str:
    rows = [(b.claim, b.got, "yes" if b.met else "**no**") for result in results for b in result.bars]
    return _table(("what was wanted", "what was measured", "reached"), rows)


def _section(result: Result, benchmark: ModuleType, folder: Path) -> str:
    title, _, about = (benchmark.__doc__ or "").strip().partition("\n")
    drawn = []
    if result.series or result.curves:
        picture = f"images/bench-{result.name.replace('_', '-')}.png"
        (plot_result if result.series else plot_curves)(result, folder / picture)
        drawn.append(f"![{title}]({picture})\n")
    facts = "\n".join(f"- {topic}: {text}" for topic, text in {**result.facts, **result.machine}.items())
    return "\n".join(
        (
            f"## {title.rstrip('.')}\n",
            f"{about.strip()}\n",
            *drawn,
            _table(result.columns, result.rows),
            facts + "\n",
            f"```\n{result.command}\n```\n",
        )
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" if i == 0 else "---:" for i in range(len(head))), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
