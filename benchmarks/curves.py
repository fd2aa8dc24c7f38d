"""One picture for figures over a quantity: a panel for each figure, a line for each contender."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plot import GRID, INK, QUIET
from benchmarks.result import Curve, Result

# Okabe and Ito's colours, which are told apart by every kind of eye; the markers tell them apart in grey.
_STYLES = (("#7b8494", "s"), ("#d55e00", "v"), ("#cc79a7", "D"), ("#56b4e9", "^"), ("#0072b2", "P"), ("#009e73", "o"))
_ACROSS = 3
_WIDTH_IN, _ROW_IN, _HEAD_IN = 11.0, 3.1, 0.55


def plot_curves(result: Result, path: Path) -> None:
    """Save a PNG of the curves of one result, three panels in a row; the last contender is drawn boldly."""
    panels: dict[str, list[Curve]] = {}
    for curve in result.curves:
        panels.setdefault(curve.panel, []).append(curve)
    labels = list(dict.fromkeys(curve.label for curve in result.curves))
    rows = -(-len(panels) // _ACROSS)
    height_in = _HEAD_IN + rows * _ROW_IN
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK}):
        figure = Figure(figsize=(_WIDTH_IN, height_in), facecolor="white")
        axes = figure.subplots(rows, _ACROSS, squeeze=False).ravel()
        for axis, (title, curves) in zip(axes, panels.items(), strict=False):
            _draw(axis, title, curves, labels)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        handles = {line.get_label(): line for axis in axes for line in axis.get_lines()}
        figure.legend(
            [handles[label] for label in labels],
            labels,
            loc="upper center",
            ncols=len(labels),
            frameon=False,
            labelcolor=INK,
        )
        figure.tight_layout(rect=(0, 0, 1, 1 - _HEAD_IN / height_in), w_pad=2, h_pad=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)


def _draw(axis: Axes, title: str, curves: list[Curve], labels: list[str]) -> None:
    axis.set_title(title, loc="left", fontsize=9, color=QUIET, pad=6)
    for curve in curves:
        if not curve.points:
            continue
        colour, marker = _STYLES[labels.index(curve.label) % len(_STYLES)]
        bold = curve.label == labels[-1]
        across, figures, lows, highs = zip(*curve.points, strict=True)
        axis.fill_between(across, lows, highs, color=colour, alpha=0.12, linewidth=0)
        axis.plot(
            across,
            figures,
            color=colour,
            marker=marker,
            markersize=7 if bold else 6,
            markeredgecolor="white",
            linewidth=2.6 if bold else 1.6,
            label=curve.label,
            zorder=3 if bold else 2,
        )
    axis.set_xticks(sorted({point[0] for curve in curves for point in curve.points}))
    axis.set_xlabel(curves[0].across, fontsize=9, color=QUIET)
    axis.set_ylim(bottom=0)
    axis.tick_params(length=0, labelsize=9, labelcolor=QUIET)
    axis.grid(axis="y", color=GRID, linewidth=1)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
