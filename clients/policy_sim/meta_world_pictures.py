"""Film strips of Meta-World episodes: what both cameras saw, and what had been said."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from policy_sim.meta_world import STEP_S
from policy_sim.meta_world_cameras import CAMERAS
from policy_sim.meta_world_episode import PLAY_STEPS, Episode
from policy_sim.meta_world_tasks import SCENES, TASKS

_INK, _PALE, _DONE, _MISSED = "#2e3440", "#8b93a3", "#2a9d8f", "#d1495b"
_MOMENTS = 4  # pictures in one strip, from the first to the last
_PALETTE_SIZE = 160


def plot_episodes(episodes: Mapping[str, Episode], path: Path, *, play_steps: int = PLAY_STEPS) -> None:
    """Save a PNG with one strip per task; the two tasks of a scene stand side by side.

    Args:
        episodes: Episode by task, with their frames.
        path: Where to save it.
        play_steps: Actions that were played of each chunk.
    """
    scenes = [scene for scene in SCENES.values() if all(task in episodes for task in scene.tasks)]
    figure = Figure(figsize=(12.4, 3.42 * len(scenes)), dpi=100, facecolor="white")
    strips = figure.subfigures(len(scenes), 2, squeeze=False, wspace=0.01, hspace=0.0)
    for row, scene in zip(strips, scenes, strict=True):
        for strip, task in zip(row, scene.tasks, strict=True):
            _draw_strip(strip, task, episodes[task], play_steps)
    figure.savefig(path)
    # The simulator's flat colours need no more than a palette, which makes the file a third as large.
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(_PALETTE_SIZE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def _draw_strip(figure: SubFigure, task: str, episode: Episode, play_steps: int) -> None:
    done = episode.succeeded(task)
    axes = figure.subplots(
        len(CAMERAS),
        _MOMENTS,
        gridspec_kw={"left": 0.03, "right": 0.99, "bottom": 0.02, "top": 0.83, "wspace": 0.03, "hspace": 0.03},
    )
    shown = np.linspace(0, len(episode.frames) - 1, _MOMENTS).round().astype(int)
    for column, frame in enumerate(shown):
        for row, camera in enumerate(CAMERAS):
            axis = axes[row, column]
            axis.imshow(episode.frames[frame][camera], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if column == 0:
                axis.set_ylabel(camera, color=_PALE, fontsize=9, labelpad=2)
        axes[0, column].set_title(
            f"{STEP_S * min(frame * play_steps, episode.steps):.1f} s", color=_PALE, fontsize=9, pad=3
        )
    outcome = f"{TASKS[task].name} done" if done else f"{TASKS[task].name} not done"
    figure.text(0.03, 0.925, f"“{episode.instruction}”", color=_INK, fontsize=13, va="center")
    figure.text(0.99, 0.925, outcome, color=_DONE if done else _MISSED, fontsize=10, va="center", ha="right")
