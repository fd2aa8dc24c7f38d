"""One picture for every benchmark: a row for each contender, from its fastest to its slowest answers."""

import textwrap
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.result import Result, Series, ms

INK, QUIET, GRID = "#2e3440", "#7b8494", "#e3e6eb"
_COLOURS = {"ours": "#2a9d8f", "peer": "#5e81ac", "reference": "#a3abba"}
_WIDTH_IN, _ROW_IN, _PANEL_IN, _EDGES_IN = 9.0, 0.44, 0.42, 0.62
_LEFT, _RIGHT = 0.235, 0.81
_FIGURES_AT = {50: 1.12, 99: 1.27}  # right edges of the printed percentiles, in widths of a panel


def plot_result(result: Result, path: Path) -> None:
    """Save a PNG of the latencies of one result, one panel for each condition, all on one scale."""
    panels: dict[str, list[Series]] = {}
    for series in result.series:
        panels.setdefault(series.panel, []).append(series)
    rows = [len(p) for p in panels.values()]
    height_in = _EDGES_IN + sum(rows) * _ROW_IN + len(rows) * _PANEL_IN
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 11, "text.color": INK}):
        figure = Figure(figsize=(_WIDTH_IN, height_in), facecolor="white")
        top_in = height_in
        axes = []
        for title, panel in panels.items():
            top_in -= _PANEL_IN
            share = len(panel) * _ROW_IN / height_in
            axis = figure.add_axes((_LEFT, top_in / height_in - share, _RIGHT - _LEFT, share))
            _draw_panel(axis, title, panel)
            axes.append(axis)
            top_in -= len(panel) * _ROW_IN
        _share_scale(axes, result.series)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=180)


def _draw_panel(axis: Axes, title: str, panel: list[Series]) -> None:
    axis.set_title(title, loc="left", fontsize=11, color=QUIET, pad=5)
    for row, series in enumerate(panel):
        colour = _COLOURS[series.role]
        axis.plot((series.p(1), series.p(99)), (row, row), color=colour, linewidth=2, solid_capstyle="butt")
        axis.plot((series.p(25), series.p(75)), (row, row), color=colour, linewidth=10, alpha=0.35)
        axis.plot(series.p(99), row, marker="|", color=colour, markersize=12, markeredgewidth=2)
        axis.plot(series.p(50), row, marker="o", color=colour, markersize=8, markeredgecolor="white")
        for percent, right in _FIGURES_AT.items():
            weight = "bold" if series.role == "ours" else "normal"
            figure = axis.text(right, row, ms(series.p(percent)), transform=axis.get_yaxis_transform())
            figure.set(ha="right", va="center", fontsize=10, fontweight=weight)
    for percent, right in _FIGURES_AT.items():
        head = axis.text(right, 1, f"p{percent} ms", transform=axis.transAxes)
        head.set(ha="right", va="bottom", fontsize=9, color=QUIET)
    axis.set_yticks(range(len(panel)), [textwrap.fill(series.label, 26) for series in panel])
    for label, series in zip(axis.get_yticklabels(), panel, strict=True):
        label.set_fontweight("bold" if series.role == "ours" else "normal")
    axis.set_ylim(len(panel) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0, pad=8, labelcolor=INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)


def _share_scale(axes: list[Axes], everything: tuple[Series, ...]) -> None:
    low, high = min(s.p(1) for s in everything), max(s.p(99) for s in everything)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlim(low / 1.25, high * 1.25)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", which="both", length=0, labelsize=9, labelcolor=QUIET)
        axis.grid(axis="x", color=GRID, linewidth=1)
        axis.set_axisbelow(True)
        axis.tick_params(labelbottom=axis is axes[-1])
    axes[-1].set_xlabel(
        "milliseconds (logarithmic): dot median, box middle half, line 1st to 99th percentile", fontsize=9, color=QUIET
    )
