"""Collects what a robot sees in many spaces, and what comes of flying in each direction from there.

The file holds, for N views: `images` (N, px, px, 3) uint8; `free` (N, rows, columns) uint8, 1 where a metre can be
flown; `bins` (N, K, 2) int16, row and column of K directions that were tried; `collided` (N, K) float32, the discounted
probability of a collision; and `spec`, a JSON text about the directions and the randomisation.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from policy_sim.flights_camera import SIZE_PX, TEXTURES, FlightsCamera
from policy_sim.flights_directions import Directions, in_world
from policy_sim.flights_field import Field
from policy_sim.flights_looks import RANDOMISE, Randomise, draw_look
from policy_sim.flights_plans import make_space, places
from policy_sim.flights_rollouts import Rollouts

logger = logging.getLogger(__name__)

FREE_M = 1.0
_CLEARANCE_M = 0.27
Views = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """What is collected.

    Attributes:
        randomise: What of the looks is drawn anew for every view.
        px: Size of the images.
        views: From each space.
        tries: Directions flown from each view.
        directions: What they are chosen from.
        rollouts: How they are flown.
        seed: Of spaces, looks and flights.
    """

    randomise: Randomise = "all"
    px: int = SIZE_PX
    views: int = 200
    tries: int = 8
    directions: Directions = field(default_factory=Directions)
    rollouts: Rollouts = field(default_factory=Rollouts)
    seed: int = 0


def collect(count: int, settings: Settings, *, jobs: int = 1) -> Views:
    """Return views of training spaces; the same settings give the same, whatever `jobs`.

    Args:
        count: How many views.
        settings: Of what.
        jobs: Processes that work at it.
    """
    spaces = -(-count // settings.views)
    with tqdm(total=spaces, desc="views", unit="space") as bar:
        parts = []
        for part in _each(partial(views_of_space, settings), range(spaces), jobs):
            parts.append(part)
            bar.update()
    joined = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
    directions = asdict(settings.directions)
    facts = {"camera": "front", "px": settings.px, "randomise": settings.randomise, "seed": settings.seed, **directions}
    return {**joined, "spec": np.array(json.dumps(facts))}


def views_of_space(settings: Settings, number: int) -> Views:
    """Return the views of one space, by the names of the file."""
    directions, rng = settings.directions, np.random.default_rng([settings.seed, number])
    space = make_space(settings.seed * 100_000 + number, held_out=False)
    clear = Field(space)
    positions = places(space, rng, settings.views, clearance_m=_CLEARANCE_M)
    yaws = rng.uniform(-np.pi, np.pi, size=settings.views)
    headings = in_world(directions.headings, yaws)
    free = clear.sweep(positions, headings, FREE_M) >= FREE_M
    tried = rng.permuted(np.tile(np.arange(headings.shape[1]), (settings.views, 1)), axis=1)[:, : settings.tries]
    flown = np.take_along_axis(headings, tried[..., None], axis=1)
    collided = settings.rollouts.collisions(clear, positions, yaws, flown, directions.reach_m, rng)
    with closing(FlightsCamera(space, held_out=False, seed=number, size_px=settings.px)) as camera:
        images = [
            camera.render(position, yaw, draw_look(rng, camera.kinds, TEXTURES, settings.randomise))
            for position, yaw in zip(positions, yaws, strict=True)
        ]
    return {
        "images": np.stack(images),
        "free": free.reshape(-1, directions.rows, directions.columns).astype(np.uint8),
        "bins": np.stack(np.divmod(tried, directions.columns), axis=-1).astype(np.int16),
        "collided": collided.astype(np.float32),
    }


def _each(work: partial[Views], numbers: Sequence[int], jobs: int) -> Iterator[Views]:
    if jobs == 1:
        yield from map(work, numbers)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, numbers)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m policy_sim.flights_views", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write (.npz)")
    parser.add_argument("--views", type=int, default=24_000, help="how many (default: %(default)s)")
    parser.add_argument("--randomise", choices=RANDOMISE, default="all", help="of the looks (default: %(default)s)")
    parser.add_argument("--px", type=int, default=SIZE_PX, help="size of the images (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = Settings(randomise=options.randomise, px=options.px, seed=options.seed)
    settings = replace(settings, views=min(settings.views, options.views))
    views = collect(options.views, settings, jobs=options.jobs)
    np.savez_compressed(options.out, allow_pickle=False, **views)
    logger.info(
        "%d views in %s; %.0f %% of directions are free, %.0f %% of flights collide at once or later",
        len(views["images"]),
        options.out,
        100 * views["free"].mean(),
        100 * (views["collided"] > 0).mean(),
    )


if __name__ == "__main__":
    main()
