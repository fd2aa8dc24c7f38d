"""Plots of an evaluation as SVG that takes its colours from the page around it."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from policy_sim.success import bootstrap, wilson
from policy_sim.trial import TrialResult

# Stand-ins that no plot uses otherwise: matplotlib wants colours, the page has variables.
_INK, _FAINT, _GOOD, _BAD = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)", _GOOD: "var(--good)", _BAD: "var(--bad)"}
_STYLE: Any = {  # matplotlib's stubs want literal keys
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "grid.alpha": 0.4,
}


def success_by_group(groups: Mapping[str, Sequence[TrialResult]]) -> str:
    """Return the rate of success of each kind of task with its Wilson interval."""

    def draw(axes: Axes) -> None:
        for row, results in enumerate(groups.values()):
            successes = sum(result.success for result in results)
            low, high = wilson(successes, len(results))
            axes.plot([100 * low, 100 * high], [row, row], color=_GOOD, linewidth=3, alpha=0.5, solid_capstyle="round")
            axes.plot(100 * successes / len(results), row, "o", color=_GOOD, markersize=8)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlim(-3, 103)
        axes.set_xlabel("success, %")
        axes.grid(axis="x")

    return _svg("groups", draw, height=1.0 + 0.4 * len(groups))


def running_success(results: Sequence[TrialResult]) -> str:
    """Return the rate of success after each episode with its Wilson interval: is it settled?"""
    successes = np.cumsum([result.success for result in results])
    counts = np.arange(1, len(results) + 1)
    bounds = [wilson(int(done), int(count)) for done, count in zip(successes, counts, strict=True)]
    low, high = 100 * np.array(bounds).T

    def draw(axes: Axes) -> None:
        axes.fill_between(counts, low, high, color=_GOOD, alpha=0.2, linewidth=0)
        axes.plot(counts, 100 * successes / counts, color=_GOOD, linewidth=2)
        axes.set_ylim(-3, 103)
        axes.set_xlim(1, max(2, len(results)))
        axes.set_xlabel("episodes")
        axes.set_ylabel("success, %")
        axes.grid(axis="y")

    return _svg("running", draw)


def histogram(name: str, values: Sequence[float]) -> str:
    """Return how a measure is distributed over the episodes, with the bootstrap interval of its mean."""
    low, high = bootstrap(values)

    def draw(axes: Axes) -> None:
        axes.hist(values, bins=min(30, max(5, round(len(values) ** 0.5))), color=_INK, alpha=0.35)
        axes.axvspan(low, high, color=_GOOD, alpha=0.35, linewidth=0)
        axes.axvline(float(np.mean(values)), color=_GOOD, linewidth=2)
        axes.set_xlabel(name)
        axes.set_ylabel("episodes")
        axes.grid(axis="y")

    return _svg(name, draw)


def paths(results: Sequence[TrialResult]) -> str | None:
    """Return the paths of all episodes from above; None if there are none."""
    drawn = [result for result in results if result.path is not None]
    if not drawn:
        return None

    def draw(axes: Axes) -> None:
        for result in sorted(drawn, key=lambda result: not result.success):  # failures on top
            assert result.path is not None
            colour = _GOOD if result.success else _BAD
            axes.plot(*result.path.T, color=colour, linewidth=1.5, alpha=0.6)
            axes.plot(*result.path[-1], "o" if result.success else "X", color=colour, markersize=5)
        axes.set_aspect("equal")
        axes.set_xlabel("x, m")
        axes.set_ylabel("y, m")

    return _svg("paths", draw, height=5.0)


def _svg(name: str, draw: Callable[[Axes], None], *, height: float = 2.8) -> str:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(6.0, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", svg)  # the same in every figure, and one page holds many
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return re.sub(
        r'<svg [^>]*viewBox="([^"]+)"[^>]*>', rf'<svg role="img" aria-label="{name}" viewBox="\1">', svg, count=1
    )
