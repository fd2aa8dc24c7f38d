"""Pictures of sorting: what the camera saw, what had been said, and what was thought."""

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from policy_sim.sorting import Sorting
from policy_sim.sorting_expert import act, think
from policy_sim.sorting_scene import draw_task
from policy_sim.sorting_words import say

_INK, _PALE = "#2e3440", "#5e6a80"
_VIEW_PX, _WORDS_PX, _GAP_PX = 224, 74, 8
_FONT_PX, _LINE_PX, _LETTERS = 12, 15, 38


@dataclass(frozen=True)
class Moment:
    """One picture with its words."""

    image: np.ndarray  # (h, w, 3) uint8
    instruction: str
    reasoning: str


def plot_moments(moments: Sequence[Moment], path: Path, *, columns: int = 4) -> None:
    """Save a PNG with one picture per moment, row by row, each with the instruction and the reasoning below."""
    rows = -(-len(moments) // columns)
    width = columns * (_VIEW_PX + _GAP_PX) - _GAP_PX
    picture = Image.new("RGB", (width, rows * (_VIEW_PX + _WORDS_PX)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_PX)
    for i, moment in enumerate(moments):
        left, top = i % columns * (_VIEW_PX + _GAP_PX), i // columns * (_VIEW_PX + _WORDS_PX)
        view = Image.fromarray(moment.image).resize((_VIEW_PX, _VIEW_PX), Image.Resampling.NEAREST)
        picture.paste(view, (left, top))
        said = textwrap.wrap(f"“{moment.instruction}”", _LETTERS)
        lines = [
            *((line, _INK) for line in said),
            *((line, _PALE) for line in textwrap.wrap(moment.reasoning, _LETTERS)),
        ]
        for number, (line, colour) in enumerate(lines):
            draw.text((left + 2, top + _VIEW_PX + 3 + number * _LINE_PX), line, fill=colour, font=font)
    picture.save(path, optimize=True)


def expert_moments(seeds: Sequence[int], steps: Sequence[int]) -> list[Moment]:
    """Return one moment of the expert per task: that after so many control steps, or the end if it comes earlier."""
    moments = []
    with Sorting(draw_task(seeds[0])) as world:
        for seed, wanted in zip(seeds, steps, strict=True):
            world.reset(draw_task(seed))
            step = 0
            while step < wanted and not world.scene.done:
                world.step(act(world.scene, think(world.scene)))
                step += 1
            order = world.scene.task.order
            moments.append(Moment(world.render(), order.instruction, say(think(world.scene))))
    return moments


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw twelve tables with what is said and thought there, as a PNG."""
    parser = argparse.ArgumentParser(prog="python -m policy_sim.sorting_pictures", description=main.__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the .png file to write")
    parser.add_argument("--seed", type=int, default=0, help="the first of twelve (default: %(default)s)")
    options = parser.parse_args(arguments)
    steps = (0, 5, 12, 0, 14, 0, 7, 20, 0, 16, 200, 0)
    plot_moments(expert_moments(range(options.seed, options.seed + len(steps)), steps), options.out)


if __name__ == "__main__":
    main()
