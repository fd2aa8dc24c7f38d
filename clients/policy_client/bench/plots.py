"""Plots as inline SVG: no script and no library, so that a page is one file that works anywhere, light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from policy_client.bench.distribution import NEVER_MS, Distribution, counts, decode, in_words

_WIDTH, _HEIGHT = 900, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 40
COLOURS = tuple(f"var(--s{number})" for number in range(1, 6))


def by_percentile(distributions: Mapping[str, Distribution], bound: tuple[str, float] | None = None) -> str:
    """Return curves of time over percentile, on an axis that gives each further nine the same room.

    Args:
        distributions: What is drawn, by name.
        bound: A level to draw across, in ms, with its name.
    """
    curves = {name: _percentile_curve(distribution) for name, distribution in distributions.items()}
    nines = max(1.0, max(math.log10(max(distribution.count, 1)) for distribution in distributions.values()))
    ticks = [(0.0, "0 %"), (math.log10(2), "50 %")]
    ticks += [(float(n), f"{100 - 100 / 10**n:.10g} %") for n in range(1, math.floor(nines) + 1)]
    label = "Time by percentile: " + "; ".join(
        f"{name} p50 {in_words(d.p50_ms)}, p99 {in_words(d.p99_ms)}" for name, d in distributions.items()
    )
    return _lines(curves, (0.0, nines), ticks, label, bound)


def over_time(slices: Sequence[str], seconds: float, bound: tuple[str, float] | None = None) -> str:
    """Return p50, p99 and the longest latency of each slice of a test."""
    curves: dict[str, list[tuple[float, float]]] = {"longest": [], "p99": [], "p50": []}
    for number, text in enumerate(slices):
        histogram = decode(text)
        if not histogram.get_total_count():
            continue
        middle_s = (number + 0.5) * seconds / len(slices)
        for name, percent in (("longest", 100.0), ("p99", 99.0), ("p50", 50.0)):
            curves[name].append((middle_s, histogram.get_value_at_percentile(percent) / 1e3))
    ticks = [(at, f"{at:g} s") for at in _steps(seconds, 8)]
    points = {name: np.array(curve, np.float64).reshape(-1, 2) for name, curve in curves.items()}
    return _lines(points, (0.0, seconds), ticks, "Latency over the time of the test", bound)


def shares(means_ms: Mapping[str, float]) -> str:
    """Return one bar that mean times make up together."""
    total = sum(means_ms.values()) or 1.0
    parts, at = [], 0.0
    for colour, (name, mean_ms) in zip(_colours(len(means_ms)), means_ms.items(), strict=True):
        width = _WIDTH * mean_ms / total
        parts.append(
            f'<rect x="{at:.1f}" y="0" width="{max(0.0, width - 2):.1f}" height="36" rx="3" fill="{colour}">'
            f"<title>{html.escape(name)}: {in_words(mean_ms)} ({mean_ms / total:.0%})</title></rect>"
        )
        at += width
    label = "Mean time: " + ", ".join(f"{name} {in_words(mean_ms)}" for name, mean_ms in means_ms.items())
    names = [f"{name}, {in_words(mean_ms)}" for name, mean_ms in means_ms.items()]
    return legend(names) + _svg(36, label, "".join(parts))


def legend(names: Sequence[str]) -> str:
    """Return which colour is what."""
    items = (
        f'<li><i style="background:{colour}"></i>{html.escape(name)}</li>'
        for colour, name in zip(_colours(len(names)), names, strict=True)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _percentile_curve(distribution: Distribution) -> NDArray[np.float64]:
    values_ms, often = counts(decode(distribution.histogram))
    if not len(values_ms):
        return np.zeros((0, 2))
    total = often.sum()
    below = np.cumsum(often) / total
    # The last value is at the percentile that one more observation could have shown.
    above = np.maximum(1 - below, 1 / total)
    points = np.stack([-np.log10(above), values_ms], axis=1)
    if len(points) > 400:  # more than there are pixels worth drawing
        points = points[np.unique(np.linspace(0, len(points) - 1, 400).astype(int))]
    return np.concatenate([[[0.0, values_ms[0]]], points])


def _lines(
    curves: Mapping[str, NDArray[np.float64]],
    across: tuple[float, float],
    ticks: Sequence[tuple[float, str]],
    label: str,
    bound: tuple[str, float] | None,
) -> str:
    finite = [curve[curve[:, 1] < NEVER_MS] for curve in curves.values()]
    highest = max([1e-3, *(float(curve[:, 1].max()) for curve in finite if len(curve))])
    if bound and bound[1] < 3 * highest:
        highest = max(highest, bound[1])
    steps = _steps(1.08 * highest, 5)
    top = max(steps[-1], 1.08 * highest)

    def x(at: float) -> float:
        return _LEFT + (at - across[0]) / (across[1] - across[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y(value_ms: float) -> float:
        return _HEIGHT - _BOTTOM - min(value_ms, top) / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(step):.1f}" y2="{y(step):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y(step) + 4:.1f}" text-anchor="end">{step:g} ms</text>'
        for step in steps
    ]
    parts += [
        f'<text x="{x(at):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{text}</text>' for at, text in ticks
    ]
    for colour, (name, curve) in zip(_colours(len(curves)), curves.items(), strict=True):
        points = " ".join(f"{x(at):.1f},{y(value_ms):.1f}" for at, value_ms in curve)
        parts.append(
            f'<polyline class="curve" stroke="{colour}" points="{points}"><title>{html.escape(name)}</title></polyline>'
        )
    if bound and bound[1] <= top:
        level = y(bound[1])
        parts.append(
            f'<line class="bound" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>'
            f'<text class="name" x="{_LEFT + 6}" y="{level - 5:.1f}">{html.escape(bound[0])}</text>'
        )
    return (legend(list(curves)) if len(curves) > 1 else "") + _svg(_HEIGHT, label, "".join(parts))


def _svg(height: int, label: str, inside: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(label)}">{inside}</svg>'


def _steps(highest: float, most: int) -> list[float]:
    """Return round numbers from 0 up to `highest`, at most about `most` of them."""
    rough = highest / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [float(f"{step * i:.6g}") for i in range(math.floor(highest / step + 1e-9) + 1)]


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
