"""The simulator against a server, over the network, with pictures: `make demo`.

Starts a server on the bundled point-maze policy unless one is named, drives a few held-out tasks through it, and
writes an animation and a plot of the paths.
"""

import argparse
import contextlib
import logging
from pathlib import Path

import numpy as np
from tqdm import tqdm

from policy_client import PolicyClient
from policy_sim.chunked import ChunkedController
from policy_sim.closed_loop import ours
from policy_sim.episode import Episode, held_out_tasks, run_episode
from policy_sim.local_server import local_server
from policy_sim.pictures import plot_paths, write_gif
from policy_sim.point_maze import PointMaze

logger = logging.getLogger(__name__)


def drive(url: str, *, episodes: int, seed: int, execute: int) -> tuple[list[Episode], list[list[np.ndarray]]]:
    """Drive held-out tasks.

    Returns:
        The episodes; and for every step of each, the path that the chunk being played would take, (H + 1, 2).
    """
    env, driven, plans = PointMaze(), [], []
    with PolicyClient(url, connect_timeout_s=60) as client:
        for number, task in enumerate(tqdm(held_out_tasks(episodes, seed), desc="episodes")):
            controller = ChunkedController(ours(client, number), execute=execute)
            episode = run_episode(env, controller, start=task.start, goal=task.goal)
            driven.append(episode)
            plans.append(_planned_paths(env, episode, controller.chunks))
    return driven, plans


def _planned_paths(env: PointMaze, episode: Episode, chunks: list[tuple[int, np.ndarray]]) -> list[np.ndarray]:
    """Play every chunk to its end in the simulator: where the ball would go without a new one; (H + 1, 2) per step."""
    paths: list[np.ndarray] = []
    ends = [begin for begin, _ in chunks[1:]] + [episode.steps]
    for (begin, chunk), end in zip(chunks, ends, strict=True):
        state = episode.states[begin]
        planned = [env.restore(state)[:2], *(env.step(action)[:2] for action in chunk)]
        paths += [np.stack(planned)] * (end - begin)
    return paths


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m policy_sim.demo", description=__doc__)
    parser.add_argument("--url", help="drive a server that runs already, such as ws://127.0.0.1:8000")
    parser.add_argument("--bundle", type=Path, default=Path("models/zoo/point-maze"), help="the bundle to serve")
    parser.add_argument("--episodes", type=int, default=24, help="held-out tasks to drive (default: 24)")
    parser.add_argument("--animate", type=int, default=3, help="how many of them to animate, 1 to 6 (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="which tasks (default: 0)")
    parser.add_argument("--execute", type=int, default=8, help="actions played of each chunk (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="where the pictures go")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    server = contextlib.nullcontext(arguments.url) if arguments.url else local_server(arguments.bundle)
    with server as url:
        episodes, plans = drive(url, episodes=arguments.episodes, seed=arguments.seed, execute=arguments.execute)
    arguments.output.mkdir(parents=True, exist_ok=True)
    reached = sum(episode.reached for episode in episodes)
    plot_paths(
        episodes,
        arguments.output / "demo-paths.png",
        title=f"{reached} of {len(episodes)} held-out goals reached, over the network",
    )
    write_gif(episodes[: arguments.animate], arguments.output / "demo.gif", chunks=plans[: arguments.animate])
    logger.info("%d of %d goals reached; see %s", reached, len(episodes), arguments.output)


if __name__ == "__main__":
    main()
