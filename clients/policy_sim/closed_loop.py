"""Success of a served policy over the network: `python -m policy_sim.closed_loop ws://127.0.0.1:8000 --tasks 100`.

Drives the held-out tasks through this project's client or through the unmodified openpi client, and prints one JSON
object. With the same seeds both clients get the same chunks, so both must succeed on the same tasks.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from policy_client import PolicyClient
from policy_sim.chunked import ChunkedController, Infer
from policy_sim.episode import Episode, held_out_tasks, run_episode
from policy_sim.point_maze import PointMaze


@dataclass(frozen=True)
class Drives:
    """What came of a set of tasks: an episode for each, and how long every chunk was waited for."""

    episodes: list[Episode]
    waits_ms: list[float]


def drive_tasks(new_infer: Callable[[int], Infer], *, tasks: int, seed: int, execute: int) -> Drives:
    """Drive every held-out task.

    Args:
        new_infer: Given a task's number, returns what answers that episode's observations with (H, 2) actions.
        tasks: How many tasks.
        seed: Which tasks.
        execute: Actions played of each chunk.
    """
    env = PointMaze()
    drives = Drives([], [])
    for number, task in enumerate(tqdm(held_out_tasks(tasks, seed), desc="episodes", file=sys.stderr)):
        controller = ChunkedController(new_infer(number), execute=execute)
        drives.episodes.append(run_episode(env, controller, start=task.start, goal=task.goal))
        drives.waits_ms.extend(controller.waits_ms)
    return drives


def chunk_seed(task: int, chunk: int) -> int:
    """Return the seed of one chunk of one task: the same for every client, so that runs can be compared."""
    return 1_000_000 * task + chunk


def ours(client: PolicyClient, task: int) -> Infer:
    """Answer one task's observations through this project's client."""
    client.reset()
    asked = -1

    def infer(observation: dict[str, np.ndarray]) -> np.ndarray:
        nonlocal asked
        asked += 1
        return client.infer(observation, seed=chunk_seed(task, asked)).actions

    return infer


def openpi(url: str) -> Callable[[int], Infer]:
    """Answer observations through openpi's own client, which must be installed."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    address = urlsplit(url)
    # openpi's client puts the port behind whatever it is given, so a path has to come without one.
    policy = WebsocketClientPolicy(address.hostname, address.port) if not address.path else WebsocketClientPolicy(url)

    def new_infer(task: int) -> Infer:
        asked = -1

        def infer(observation: dict[str, np.ndarray]) -> np.ndarray:
            nonlocal asked
            asked += 1
            reply = policy.infer({**observation, "options": {"seed": chunk_seed(task, asked)}})
            return np.asarray(reply["actions"])

        return infer

    return new_infer


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m policy_sim.closed_loop", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("url", help="the server, such as ws://127.0.0.1:8000")
    parser.add_argument("--client", choices=["ours", "openpi"], default="ours", help="which client (default: ours)")
    parser.add_argument("--tasks", type=int, default=100, help="held-out tasks to drive (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="which tasks (default: 0)")
    parser.add_argument("--execute", type=int, default=8, help="actions played of each chunk (default: 8)")
    arguments = parser.parse_args()

    options = {"tasks": arguments.tasks, "seed": arguments.seed, "execute": arguments.execute}
    if arguments.client == "openpi":
        drives = drive_tasks(openpi(arguments.url), **options)
    else:
        with PolicyClient(arguments.url) as client:
            drives = drive_tasks(lambda task: ours(client, task), **options)
    json.dump(
        {
            "client": arguments.client,
            **options,
            "success": [episode.reached for episode in drives.episodes],
            "steps": [episode.steps for episode in drives.episodes],
            "waits_ms": drives.waits_ms,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
