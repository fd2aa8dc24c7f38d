"""How far and how long robots fly free of collision in spaces that no training has shown."""

import argparse
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from policy_models.cad2rl.config import Steering
from policy_models.cad2rl.steering import steer
from policy_models.directions import CollisionSpec
from policy_models.spec import Observation, SamplingOptions
from policy_server.bundle import load_bundle
from policy_server.engine.base import ENGINES
from policy_server.runtime.sampling import drive

logger = logging.getLogger(__name__)

LIMIT_S = 60.0
_RESAMPLES = 2000
# What one who knows how far each direction is free takes for a collision: less than this.
_NEAR_M = 1.5
# The grid of those who fly without a bundle.
_DIRECTIONS = CollisionSpec("front", rows=9, columns=13, fov_deg=(90.0, 60.0), reach_m=6.0)


class World(Protocol):
    """A flight in one space, as `policy_sim.flights.Flights` is."""

    @property
    def flown_m(self) -> float:
        """The way so far."""

    @property
    def elapsed_s(self) -> float:
        """The time so far."""

    def image(self) -> np.ndarray:
        """Return what the camera sees, (px, px, 3) uint8."""

    def step(self, velocity: np.ndarray, /) -> bool:
        """Fly for 0.1 s with a velocity and a yaw rate, (4,); returns whether there was a collision."""

    def room(self, grid: CollisionSpec, /) -> np.ndarray:
        """Return how far each direction is free, (rows, columns), in m."""


Pilot = Callable[[World], np.ndarray]


@dataclass(frozen=True)
class Flight:
    """What came of one flight.

    Attributes:
        seed: Of the space.
        flown_m: Until the collision, or in all.
        elapsed_s: Likewise.
        collided: Whether a collision ended it.
    """

    seed: int
    flown_m: float
    elapsed_s: float
    collided: bool


def straight(world: World) -> np.ndarray:
    """Fly ahead, whatever comes: the floor."""
    return np.array([Steering().speed_m_s, 0.0, 0.0, 0.0], dtype=np.float32)


def all_seeing(world: World) -> np.ndarray:
    """Steer by the true distances: what the same steering could do with perfect predictions."""
    room_m = world.room(_DIRECTIONS)
    # The farther, the better; nothing that is free for `_NEAR_M` counts as blocked.
    collision = np.where(room_m < _NEAR_M, 1.0, 0.8 * (1 - np.minimum(room_m / _DIRECTIONS.reach_m, 1.0)))
    return steer(collision, _DIRECTIONS, replace(Steering(), calm=0.75))


def served(path: Path, engine: str, steering: Steering | None = None) -> Pilot:
    """Return a bundle as the server runs it: its own program, driven with an engine on one thread.

    Args:
        path: The bundle.
        engine: A name from `policy_server.engine.base.ENGINES`.
        steering: Instead of the bundle's own.
    """
    bundle = load_bundle(path)
    runner, program = ENGINES[engine].make(bundle, 1), bundle.new_program()
    camera = bundle.spec.cameras[0].name

    def fly(world: World) -> np.ndarray:
        observation = Observation(images={camera: world.image()}, state=None, goal=None)
        outcome = drive(program.infer(observation, program.begin(), SamplingOptions(seed=0)), runner)
        if steering is None:
            return outcome.actions[0]
        assert outcome.collision is not None and bundle.spec.collision is not None, "CAD2RL predicts collisions"
        return steer(outcome.collision, bundle.spec.collision, steering)

    return fly


def fly(pilot: Pilot, world: World, *, seed: int, limit_s: float) -> Flight:
    """Fly until a collision, or for `limit_s`."""
    collided = False
    while not collided and world.elapsed_s < limit_s - 1e-6:
        collided = world.step(pilot(world))
    return Flight(seed, round(world.flown_m, 3), round(world.elapsed_s, 2), collided)


def measure(
    pilot: Pilot, seeds: Sequence[int], *, limit_s: float = LIMIT_S, randomise: Any = "all", px: int = 64, name: str
) -> list[Flight]:
    """Fly once in each held-out space; the same seeds are the same spaces for every pilot."""
    from policy_sim.flights import Flights

    flights = []
    for seed in tqdm(seeds, desc=name, unit="flight"):
        with closing(Flights(seed, held_out=True, randomise=randomise, size_px=px)) as world:
            flights.append(fly(pilot, world, seed=seed, limit_s=limit_s))
    return flights


def summarise(flights: Sequence[Flight]) -> dict[str, Any]:
    """Return means with their 95 % intervals, and the share of flights that a collision ended."""
    metres = np.array([flight.flown_m for flight in flights])
    seconds = np.array([flight.elapsed_s for flight in flights])
    ended = sum(flight.collided for flight in flights)
    return {
        "flights": len(flights),
        "metres": round(float(metres.mean()), 2),
        "metres_interval_95": bootstrap(metres),
        "seconds": round(float(seconds.mean()), 2),
        "seconds_interval_95": bootstrap(seconds),
        "collided": round(ended / len(flights), 4),
        "collisions_per_100_m": round(100 * ended / max(float(metres.sum()), 1e-9), 2),
    }


def bootstrap(values: np.ndarray) -> list[float]:
    """Return the 95 % percentile interval of the mean of `values`, (N,), from resampling them."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (_RESAMPLES, len(values)))].mean(1)
    return [round(float(bound), 2) for bound in np.percentile(means, (2.5, 97.5))]


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return results as a Markdown table."""
    lines = ["| pilot | metres free of collision (95 %) | seconds (95 %) | ended by a collision |", "| --- " * 4 + "|"]
    for name, row in results.items():
        far, long = row["metres_interval_95"], row["seconds_interval_95"]
        lines.append(
            f"| {name} | {row['metres']:.1f} ({far[0]:.1f} to {far[1]:.1f}) "
            f"| {row['seconds']:.1f} ({long[0]:.1f} to {long[1]:.1f}) | {100 * row['collided']:.0f} % |"
        )
    return "\n".join(lines)


def plot(flights: Mapping[str, Sequence[Flight]], path: Path, limit_s: float) -> None:
    """Save a picture of the share of flights that are still flying after each distance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, flown in flights.items():
        # A flight that no collision ended goes on beyond what was measured.
        ends = sorted(flight.flown_m for flight in flown if flight.collided)
        left = 1 - np.arange(len(ends) + 1) / len(flown)
        axes.step([0.0, *ends], left, where="post", label=name)
    axes.set(xlabel="metres flown", ylabel="share still flying", ylim=(0, 1.02))
    axes.set_title(f"Flights of at most {limit_s:g} s in held-out spaces")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fly through held-out spaces until a collision, and print how far that was.

    Pilots are folders of bundles, or "straight", which flies ahead, or "all-seeing", which knows how far every
    direction is free. All pilots fly through the same spaces from the same beginnings.

    Example: python -m policy_models.cad2rl.evaluate models/zoo/cad2rl straight all-seeing --flights 100
    """
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(main), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pilots", nargs="+", help='folders of policies, "straight" or "all-seeing"')
    parser.add_argument("--engine", choices=list(ENGINES), default="onnx", help="default: %(default)s")
    parser.add_argument("--flights", type=int, default=100, help="each in its own space (default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of a flight (default: %(default)s)")
    parser.add_argument("--randomise", choices=["all", "textures", "none"], default="all", help="default: %(default)s")
    parser.add_argument("--px", type=int, default=64, help="size of the images (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    parser.add_argument("--plot", type=Path, help="draw how many are still flying after each distance (.png)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    known: dict[str, Pilot] = {"straight": straight, "all-seeing": all_seeing}
    flown = {
        Path(name).name: measure(
            known[name] if name in known else served(Path(name), options.engine),
            range(options.flights),
            limit_s=options.limit_s,
            randomise=options.randomise,
            px=options.px,
            name=Path(name).name,
        )
        for name in options.pilots
    }
    results = {name: summarise(flights) for name, flights in flown.items()}
    print(table(results))
    if options.json:
        settings = {"limit_s": options.limit_s, "randomise": options.randomise, "engine": options.engine}
        every = {name: [asdict(flight) for flight in flights] for name, flights in flown.items()}
        whole = {**settings, "pilots": results, "flights": every}
        options.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(flown, options.plot, options.limit_s)


if __name__ == "__main__":
    main()
