"""Six tasks in Meta-World against a server, over the network, with pictures: part of `make demo`.

Starts a server on the bundled MoDE policy unless one is named, tells it to do each task in turn, with images as JPEG,
and writes an animation and a film strip of the episodes.
"""

import argparse
import contextlib
import io
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from policy_client import PolicyClient
from policy_sim.local_server import local_server
from policy_sim.meta_world import STEP_S, MetaWorld
from policy_sim.meta_world_episode import PLAY_STEPS, Episode, Images, Policy, held_out_seeds, run_episode
from policy_sim.meta_world_pictures import plot_episodes
from policy_sim.meta_world_tasks import SCENES, TASKS

logger = logging.getLogger(__name__)

_VIEW_PX, _WORDS_PX, _JPEG_QUALITY = 192, 22, 95


def over_the_network(client: PolicyClient, *, seed: int) -> Policy:
    """Answer one episode's images and instruction through a client, with chunks that the seed decides."""
    client.reset()
    asked = -1

    def act(images: Images, instruction: str) -> np.ndarray:
        nonlocal asked
        asked += 1
        cameras = {name: _jpeg(image) for name, image in images.items()}
        return client.infer({**cameras, "prompt": instruction}, seed=1_000 * seed + asked).actions

    return act


def drive(url: str, *, number: int) -> dict[str, Episode]:
    """Drive one held-out episode of every task; returns them by task."""
    episodes = {}
    with PolicyClient(url, connect_timeout_s=60) as client, tqdm(total=len(TASKS), desc="tasks") as bar:
        for scene in SCENES.values():
            with contextlib.closing(MetaWorld(scene.name)) as world:
                for task in scene.tasks:
                    episodes[task] = run_episode(
                        world,
                        over_the_network(client, seed=number),
                        instruction=TASKS[task].phrases[0],
                        seed=held_out_seeds(number + 1)[number],
                        keep_frames=True,
                    )
                    bar.update()
    return episodes


def write_gif(episodes: dict[str, Episode], path: Path) -> None:
    """Save an animation of all episodes side by side, at half speed; those that end early wait for the others."""
    longest = max(len(episode.frames) for episode in episodes.values())
    rows = [scene.tasks for scene in SCENES.values()]
    height = _VIEW_PX + _WORDS_PX
    frames = []
    for i in range(longest):
        frame = Image.new("RGB", (2 * 2 * _VIEW_PX, len(rows) * height), "white")
        for row, tasks in enumerate(rows):
            for column, task in enumerate(tasks):
                _paste(frame, episodes[task], i, left=2 * _VIEW_PX * column, top=height * row)
        frames.append(frame.quantize(96, dither=Image.Dither.NONE))
    step_ms = round(2e3 * STEP_S * PLAY_STEPS)
    durations = [step_ms] * (longest - 1) + [1500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)


def _paste(frame: Image.Image, episode: Episode, i: int, *, left: int, top: int) -> None:
    images = episode.frames[min(i, len(episode.frames) - 1)]
    for j, name in enumerate(("static", "wrist")):
        view = Image.fromarray(images[name]).resize((_VIEW_PX, _VIEW_PX), Image.Resampling.BICUBIC)
        frame.paste(view, (left + j * _VIEW_PX, top + _WORDS_PX))
    over = i >= len(episode.frames) - 1
    words = episode.instruction + (": done" if over and episode.done_at else "")
    draw = ImageDraw.Draw(frame)
    draw.text((left + 6, top + 3), words, fill="#2a9d8f" if over else "#2e3440", font=ImageFont.load_default(14))


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m policy_sim.meta_world_demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--url", help="drive a server that runs already, such as ws://127.0.0.1:8000")
    parser.add_argument("--bundle", type=Path, default=Path("models/zoo/meta-world"), help="the bundle to serve")
    parser.add_argument("--number", type=int, default=0, help="which held-out start (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="where the pictures go")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    with contextlib.nullcontext(arguments.url) if arguments.url else local_server(arguments.bundle) as url:
        episodes = drive(url, number=arguments.number)
    arguments.output.mkdir(parents=True, exist_ok=True)
    plot_episodes(episodes, arguments.output / "demo-meta-world.png")
    write_gif(episodes, arguments.output / "demo-meta-world.gif")
    done = sum(episode.succeeded(task) for task, episode in episodes.items())
    logger.info("%d of %d tasks done; see %s", done, len(episodes), arguments.output)


if __name__ == "__main__":
    main()
