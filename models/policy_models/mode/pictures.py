"""Draws which experts of a MoDE policy serve which noise level."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels
from policy_models.mode.routing import Routes, asked_levels
from policy_models.spec import SamplerSpec

_INK, _PALE, _GRID = "#2e3440", "#8b93a3", "#ffffff"
_WEIGHTS = LinearSegmentedColormap.from_list("weights", ["#f2f1ed", "#9fd0c9", "#2a9d8f", "#134e4a"])
_EXPERTS = ("#2a9d8f", "#e9a23b", "#d1495b", "#7b6fd0", "#4c86c6", "#8a6d3b", "#5f9e4a", "#b0508f")
_SIGMA = r"$\sigma$"
_FINE = 400  # noise levels along a curve


def plot_experts(routes: Routes, sampler: SamplerSpec, path: Path) -> None:
    """Save a PNG of every block's experts over the noise levels.

    Above, the weight of each expert at each denoising step of the policy's own schedule; below, over all noise levels
    between, with the steps marked. A policy whose goals take part in routing is drawn for no goal.

    Args:
        routes: Of the policy.
        sampler: The policy's default sampler.
        path: Where to save it.
    """
    levels = NoiseLevels(sampler.sigma_min, sampler.sigma_max, sampler.rho)
    asked = np.array(asked_levels(sampler.sampler, SCHEDULES[sampler.schedule](sampler.steps, levels)))
    fine = np.geomspace(sampler.sigma_max, sampler.sigma_min, _FINE)
    at_steps, between = routes.of(list(asked)), routes.of(list(fine))  # (N, blocks, E)
    _, blocks, experts = at_steps.shape

    columns = min(blocks, 4)
    rows = -(-blocks // columns)
    figure = Figure(figsize=(3.3 * columns + 0.6, 4.1 * rows + 0.5), dpi=120, layout="constrained", facecolor="white")
    heights = [0.32 * experts + 0.2, 1.25] * rows
    axes = figure.subplots(2 * rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for unused in axes.ravel():
        unused.set_visible(False)
    for block in range(blocks):
        row, column = divmod(block, columns)
        above, below = axes[2 * row, column], axes[2 * row + 1, column]
        _draw_steps(above, asked, at_steps[:, block])
        _draw_curves(below, fine, between[:, block], asked)
        above.set_title(f"block {block + 1}", color=_INK, fontsize=12, pad=8)
        above.set_yticks(range(experts), [str(e + 1) if column else f"expert {e + 1}" for e in range(experts)])
        if column == 0:
            below.set_ylabel("weight", color=_INK)
        else:
            below.set_yticklabels([])
    figure.suptitle(
        f"Which experts remove which noise, from {_SIGMA} = {sampler.sigma_max:g} to {sampler.sigma_min:g}",
        color=_INK,
        fontsize=14,
    )
    figure.savefig(path)


def _draw_steps(axes: Axes, asked: np.ndarray, weights: np.ndarray) -> None:
    """Draw a cell for each expert and denoising step; `weights` is (N, E)."""
    axes.set_visible(True)
    axes.imshow(weights.T, cmap=_WEIGHTS, vmin=0, vmax=1, aspect="auto")
    for step, of_step in enumerate(weights):
        for expert, weight in enumerate(of_step):
            if weight > 0 and len(asked) <= 12:
                text = f"{100 * weight:.0f}"
                axes.text(
                    step, expert, text, ha="center", va="center", fontsize=7, color="white" if weight > 0.45 else _INK
                )
    axes.set_xticks(range(len(asked)), [_short(sigma) for sigma in asked], fontsize=7, rotation=45)
    axes.set_xticks(np.arange(len(asked) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(weights.shape[1] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=_GRID, linewidth=1.5)
    axes.tick_params(which="both", length=0, colors=_INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"{_SIGMA} at each denoising step; weight in %", color=_PALE, fontsize=8)


def _draw_curves(axes: Axes, sigmas: np.ndarray, weights: np.ndarray, asked: np.ndarray) -> None:
    """Draw the weights over all noise levels, stacked; `weights` is (N, E)."""
    axes.set_visible(True)
    colours = [_EXPERTS[e % len(_EXPERTS)] for e in range(weights.shape[1])]
    axes.stackplot(sigmas, weights.T, colors=colours, linewidth=0)
    middles = np.cumsum(weights, axis=1) - weights / 2
    for expert in range(weights.shape[1]):
        widest = _middle_of_longest(weights[:, expert] > 0.12)
        if widest is not None:
            where = (sigmas[widest], middles[widest, expert])
            axes.text(*where, str(expert + 1), color="white", ha="center", va="center", fontsize=11, weight="bold")
    axes.vlines(asked, 0, 1, color="white", linewidth=0.7, alpha=0.6)
    axes.set_xscale("log")
    axes.set_xlim(sigmas[0], sigmas[-1])
    axes.set_ylim(0, 1)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(_SIGMA, color=_PALE, fontsize=9)


def _middle_of_longest(run: np.ndarray) -> int | None:
    """Return the middle of the longest run of True, or None if there is none worth a label."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], run, [False])).astype(int)))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts) or (ends - starts).max() < len(run) // 12:
        return None
    longest = int((ends - starts).argmax())
    return int((starts[longest] + ends[longest]) // 2)


def _short(sigma: float) -> str:
    return f"{sigma:.0f}" if sigma >= 10 else f"{sigma:.2g}"
