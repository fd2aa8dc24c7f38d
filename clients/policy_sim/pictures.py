"""Episodes seen from above: a still of their paths, an animation of their drives."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle
from PIL import Image, ImageDraw

from policy_sim.episode import Episode
from policy_sim.point_maze import BALL_RADIUS_M, GRID, REACHED_M, STEP_S

_FLOOR, _WALL, _INK = "#f7f5f0", "#3b4252", "#2e3440"
_REACHED, _MISSED, _TRAIL, _GOAL, _CHUNK = "#2a9d8f", "#d1495b", "#a3abba", "#e9a23b", "#a898f2"

_EDGE_M = 0.7  # of the outer wall, left out of the picture
_WIDTH_M, _HEIGHT_M = (size_m - 2 * _EDGE_M for size_m in GRID.size_m)
_TIME_COLOURS = ListedColormap(colormaps["plasma"](np.linspace(0.0, 0.82, 256)))  # its yellow is lost on the floor

_GIF_WIDTH_PX = 840
_MAX_PANEL_PX = 420
_GAP_PX = 8
_OVERSAMPLING = 3  # drawn this much larger and shrunk, since Pillow draws without anti-aliasing
_MAX_FRAMES = 120
_LAST_FRAME_MS = 1500
_PALETTE_SIZE = 64


def plot_paths(
    episodes: Sequence[Episode], path: Path, *, title: str, colour_by: Literal["time", "success"] = "time"
) -> None:
    """Save a PNG of the maze from above with the path of every episode.

    Args:
        episodes: What to draw.
        path: Where to save it.
        title: Stands above the maze.
        colour_by: "time" shades each path from its beginning to its end; "success" tells reached from missed.
    """
    figure = Figure(figsize=(6.4, 6.2), dpi=140, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    _draw_maze(axes, goals=list(np.unique([episode.goal for episode in episodes], axis=0)))
    paths = [episode.states[:, :2] for episode in episodes]
    if colour_by == "time":
        segments = np.concatenate([np.stack([points[:-1], points[1:]], axis=1) for points in paths])
        times_s = np.concatenate([STEP_S * np.arange(len(points) - 1) for points in paths])
        lines = LineCollection(list(segments), array=times_s, cmap=_TIME_COLOURS, linewidth=2.0, capstyle="round")
        axes.add_collection(lines)
        bar = figure.colorbar(lines, ax=axes, fraction=0.04, pad=0.02, label="time, s")
        bar.outline.set_visible(False)
    else:
        colours = [_REACHED if episode.reached else _MISSED for episode in episodes]
        axes.add_collection(LineCollection(paths, colors=colours, linewidth=2.0, alpha=0.8, capstyle="round"))
    starts, goals = np.stack([points[0] for points in paths]), np.stack([episode.goal for episode in episodes])
    axes.scatter(starts[:, 0], starts[:, 1], s=42, facecolor="white", edgecolor=_INK, linewidth=1.4, zorder=4)
    axes.scatter(goals[:, 0], goals[:, 1], s=150, marker="*", facecolor=_GOAL, edgecolor=_INK, linewidth=0.9, zorder=5)
    axes.set_title(title, color=_INK, fontsize=13, pad=10)
    _draw_legend(axes, colour_by)
    figure.savefig(path)


def write_gif(
    episodes: Sequence[Episode],
    path: Path,
    *,
    chunks: Sequence[Sequence[np.ndarray]] | None = None,
) -> None:
    """Save an animated GIF of episodes side by side, in real time, each in its own maze.

    Args:
        episodes: One to six episodes.
        path: Where to save it.
        chunks: For each episode and each of its steps, the positions that the policy foresaw there: one polyline
            (H, 2), or several of them (K, H, 2), in metres.
    """
    panel_px = min(_MAX_PANEL_PX, (_GIF_WIDTH_PX + _GAP_PX) // len(episodes) - _GAP_PX)
    longest_steps = max(episode.steps for episode in episodes)
    stride_steps = max(1, math.ceil(longest_steps / _MAX_FRAMES))
    moments = [*range(0, longest_steps, stride_steps), longest_steps]
    frames = []
    for moment in moments:
        frame = Image.new("RGB", ((panel_px + _GAP_PX) * len(episodes) - _GAP_PX, panel_px), "white")
        for i, episode in enumerate(episodes):
            panel = _Panel(panel_px)
            _draw_moment(panel, episode, moment, None if chunks is None else chunks[i])
            frame.paste(panel.shrunk(), (i * (panel_px + _GAP_PX), 0))
        frames.append(frame)

    # One palette for all frames, without dithering: then pixels that do not change cost nothing.
    palette = frames[len(frames) // 2].quantize(_PALETTE_SIZE)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    durations_ms = [round(1000 * STEP_S * stride_steps)] * (len(frames) - 1) + [_LAST_FRAME_MS]
    first.save(path, save_all=True, append_images=rest, duration=durations_ms, loop=0, optimize=True)


class _Panel:
    """One maze of an animation, drawn in metres."""

    def __init__(self, width_px: int) -> None:
        self._width_px = width_px
        self._px_per_m = width_px * _OVERSAMPLING / _WIDTH_M
        self._image = Image.new("RGB", (width_px * _OVERSAMPLING,) * 2, _FLOOR)
        self._draw = ImageDraw.Draw(self._image, "RGBA")

    def shrunk(self) -> Image.Image:
        return self._image.resize((self._width_px,) * 2, Image.Resampling.BOX)

    def walls(self) -> None:
        for left_m, bottom_m, width_m, height_m in GRID.wall_blocks:
            corners = self._pixels(np.array([[left_m, bottom_m + height_m], [left_m + width_m, bottom_m]]))
            self._draw.rectangle(corners, fill=_WALL)

    def line(self, points_m: np.ndarray, colour: str, width_m: float) -> None:
        """Draw a polyline, (P, 2) metres, in an opaque colour: Pillow draws the joints twice."""
        if len(points_m) > 1:
            self._draw.line(self._pixels(points_m), colour, round(width_m * self._px_per_m), joint="curve")

    def disc(self, centre_m: np.ndarray, radius_m: float, fill: str | None, outline: str, width_m: float) -> None:
        (centre,) = self._pixels(centre_m[None])
        self._draw.circle(centre, radius_m * self._px_per_m, fill, outline, round(width_m * self._px_per_m))

    def _pixels(self, points_m: np.ndarray) -> list[tuple[float, float]]:
        x_px = (points_m[:, 0] + _WIDTH_M / 2) * self._px_per_m
        y_px = (_HEIGHT_M / 2 - points_m[:, 1]) * self._px_per_m
        return list(zip(x_px.tolist(), y_px.tolist(), strict=True))


def _draw_moment(panel: _Panel, episode: Episode, moment: int, chunks: Sequence[np.ndarray] | None) -> None:
    step = min(moment, episode.steps)
    arrived = episode.reached and step == episode.steps
    panel.disc(episode.goal, REACHED_M, _REACHED + "66" if arrived else _GOAL + "33", _GOAL, 0.03)
    panel.walls()
    panel.disc(episode.goal, 0.08, _GOAL, _INK, 0.02)
    panel.disc(episode.states[0, :2], 0.08, "#ffffff", _INK, 0.03)
    panel.line(episode.states[: step + 1, :2], _TRAIL, 0.05)
    if chunks is not None and step < min(episode.steps, len(chunks)):
        for future_m in chunks[step].reshape(-1, *chunks[step].shape[-2:]):
            panel.line(future_m, _CHUNK, 0.05)
    ball = _MISSED if step == episode.steps and not episode.reached else _REACHED
    panel.disc(episode.states[step, :2], 1.4 * BALL_RADIUS_M, ball, _INK, 0.03)


def _draw_maze(axes: Axes, goals: Sequence[np.ndarray]) -> None:
    axes.set(xlim=(-_WIDTH_M / 2, _WIDTH_M / 2), ylim=(-_HEIGHT_M / 2, _HEIGHT_M / 2), aspect="equal")
    axes.set_facecolor(_FLOOR)
    for goal in goals:
        axes.add_patch(Circle((float(goal[0]), float(goal[1])), REACHED_M, color=_GOAL, alpha=0.15, linewidth=0))
    for left_m, bottom_m, block_width_m, block_height_m in GRID.wall_blocks:
        # An edge of the same colour closes the hairlines between neighbouring blocks.
        axes.add_patch(Rectangle((left_m, bottom_m), block_width_m, block_height_m, color=_WALL, linewidth=0.6))
    axes.set_xlabel("x, m", color=_INK)
    axes.set_ylabel("y, m", color=_INK)
    axes.tick_params(length=0, labelcolor=_INK, labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_legend(axes: Axes, colour_by: Literal["time", "success"]) -> None:
    entries = [
        Line2D([], [], linestyle="", marker="o", markerfacecolor="white", markeredgecolor=_INK, label="start"),
        Line2D([], [], linestyle="", marker="*", markersize=12, color=_GOAL, markeredgecolor=_INK, label="goal"),
    ]
    if colour_by == "success":
        entries += [Line2D([], [], color=_REACHED, label="reached"), Line2D([], [], color=_MISSED, label="missed")]
    axes.legend(handles=entries, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=4, frameon=False)
