"""A robot that sorts in real time while its policy thinks aloud, as an animation: camera, words and actions.

Starts a server on the bundled DiVLA policy unless one is named. Observations are streamed five times a second, actions
are played at 10 Hz from the newest chunk, and what the policy says arrives token by token.
"""

import argparse
import contextlib
import logging
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from policy_client.chunk import ActionChunk
from policy_client.stream import PolicyStream
from policy_client.stream_protocol import Reasoning
from policy_sim.local_server import local_server
from policy_sim.sorting import Sorting
from policy_sim.sorting_episode import LIMIT_STEPS, evaluation_tasks, observe
from policy_sim.sorting_scene import STEP_S, TOP_SPEED_M_S, Task

logger = logging.getLogger(__name__)

_VIEW_PX, _PANEL_PX, _GAP_PX = 280, 320, 10
_INK, _PALE, _LINE = "#2e3440", "#9aa5b8", 17
_COLOURS = ("#d1495b", "#2a6f97", "#4f772d")
_NAMES = ("vx", "vy", "grip")
_OBSERVE_EVERY = 2
_REST = np.array([0.0, 0.0, -1.0], dtype=np.float32)


@dataclass(frozen=True)
class Moment:
    """What there was at one control step.

    Attributes:
        image: What the camera saw, (h, w, 3) uint8.
        instruction: What was ordered.
        said: What the policy was saying, as far as it had come.
        chunk: What was being played; None while there was nothing.
        age_s: How far into the chunk.
    """

    image: np.ndarray
    instruction: str
    said: str
    chunk: ActionChunk | None
    age_s: float


def sort(url: str, tasks: Sequence[Task]) -> tuple[list[Moment], int]:
    """Sort one table after the other in real time; returns every step, and how many orders were carried out."""
    moments: list[Moment] = []
    done = 0
    words = _Words()
    with Sorting(tasks[0]) as world, PolicyStream(url, on_reasoning=words.hear, connect_timeout_s=60) as stream:
        for task in tqdm(tasks, desc="orders", unit="order"):
            world.reset(task)
            stream.reset()
            words.text = ""
            next_s = time.monotonic()
            for step in range(LIMIT_STEPS):
                now_s = time.monotonic()
                seen = observe(world)
                if step % _OBSERVE_EVERY == 0:
                    stream.send(seen, captured_s=now_s)
                chunk = stream.latest()
                action = None if chunk is None else chunk.action_at(now_s)
                age_s = 0.0 if chunk is None else now_s - chunk.made_at_s
                moments.append(Moment(seen["top"], seen["prompt"], words.text, chunk, age_s))
                if world.step(_REST if action is None else action):
                    done += 1
                    moments += [Moment(world.render(), seen["prompt"], words.text, None, 0.0)] * 6
                    break
                next_s += STEP_S
                time.sleep(max(0.0, next_s - time.monotonic()))
    return moments, done


def write_gif(moments: Sequence[Moment], path: Path) -> None:
    """Save an animation in real time."""
    frames = [_frame(moment).quantize(64, dither=Image.Dither.NONE) for moment in moments]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1e3 * STEP_S), loop=0, optimize=True)


class _Words:
    """What is being said; told by the stream's thread."""

    def __init__(self) -> None:
        self.text = ""

    def hear(self, reasoning: Reasoning) -> None:
        self.text = reasoning.text


def _frame(moment: Moment) -> Image.Image:
    frame = Image.new("RGB", (_VIEW_PX + _PANEL_PX, _VIEW_PX), "white")
    view = Image.fromarray(moment.image).resize((_VIEW_PX, _VIEW_PX), Image.Resampling.BICUBIC)
    frame.paste(view, (0, 0))
    draw, font = ImageDraw.Draw(frame), ImageFont.load_default(14)
    left, top = _VIEW_PX + _GAP_PX, _GAP_PX
    for text, colour in ((f"“{moment.instruction}”", _INK), (moment.said or "...", "#2a6f97")):
        for line in textwrap.wrap(text, 40):
            draw.text((left, top), line, fill=colour, font=font)
            top += _LINE
        top += 6
    _plot(draw, moment, left=left, top=130, width=_PANEL_PX - 2 * _GAP_PX, height=_VIEW_PX - 150)
    return frame


def _plot(draw: ImageDraw.ImageDraw, moment: Moment, *, left: int, top: int, width: int, height: int) -> None:
    """Draw the chunk being played: its actions over time, and where in it the robot is."""
    draw.line((left, top + height / 2, left + width, top + height / 2), fill=_PALE)
    font = ImageFont.load_default(12)
    for i, (name, colour) in enumerate(zip(_NAMES, _COLOURS, strict=True)):
        draw.text((left + 48 * i, top + height + 4), name, fill=colour, font=font)
    if moment.chunk is None:
        return
    actions = moment.chunk.actions / np.array([TOP_SPEED_M_S, TOP_SPEED_M_S, 1.0])
    xs = left + width * np.arange(len(actions)) / (len(actions) - 1)
    for values, colour in zip(actions.T, _COLOURS, strict=True):
        ys = top + height / 2 * (1 - np.clip(values, -1, 1))
        draw.line([(float(x), float(y)) for x, y in zip(xs, ys, strict=True)], fill=colour, width=2)
    now = left + width * min(1.0, moment.age_s / (moment.chunk.step_s * (len(actions) - 1)))
    draw.line((now, top, now, top + height), fill=_INK)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m policy_sim.sorting_demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--url", help="drive a server that runs already, such as ws://127.0.0.1:8000")
    parser.add_argument("--bundle", type=Path, default=Path("models/zoo/sorting"), help="the bundle to serve")
    parser.add_argument("--orders", type=int, default=4, help="how many tables (default: 4)")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="where the animation goes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    tasks = evaluation_tasks(arguments.orders, held_out=False)
    name = arguments.bundle.name
    with contextlib.nullcontext(arguments.url) if arguments.url else local_server(arguments.bundle) as url:
        moments, done = sort(f"{url}/v1/policies/{name}/stream", tasks)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_gif(moments, arguments.output / "demo-sorting.gif")
    logger.info("%d of %d orders carried out; see %s/demo-sorting.gif", done, len(tasks), arguments.output)


if __name__ == "__main__":
    main()
