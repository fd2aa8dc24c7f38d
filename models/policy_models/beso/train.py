"""Trains the BESO policies that ship with the project: play data in, a policy with its measured results out."""

import argparse
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from policy_models.beso.config import BesoConfig
from policy_models.beso.dataset import PlayWindows
from policy_models.beso.evaluate import PICTURED, Fleet, Policy, draw_goal_free, measure
from policy_models.beso.network import make_denoiser
from policy_models.beso.program import BesoProgram
from policy_models.diffusion.preconditioning import Denoiser, ExponentialAverage, loglogistic
from policy_models.normalizer import Normalizer, Statistics
from policy_models.spec import GoalSpec, PolicySpec, SamplerSpec, VectorSpec
from policy_sim.episode import held_out_tasks
from policy_sim.play import DISTURBANCE, collect
from policy_sim.point_maze import STEP_S

logger = logging.getLogger(__name__)

SAMPLER = SamplerSpec(sampler="ddim", schedule="exponential", steps=3, sigma_min=0.02, sigma_max=1.0)
PLAY_EPISODES = 1500

_BATCH = 128
_PEAK_RATE = 1e-3
_WARM_UP = 0.02  # of the training
_GOAL_DROPOUT = 0.1


@dataclass(frozen=True)
class Recipe:
    """One policy that this file can train.

    Attributes:
        description: One sentence for people.
        config: Its network.
        execute: Actions of a chunk that are played before the next is asked for.
        steps: Optimiser steps, unless the command line says otherwise.
        action_noise: Noise on the actions of the play it learns from, one level for each equal part of the episodes.
    """

    description: str
    config: BesoConfig
    execute: int
    steps: int
    action_noise: tuple[float, ...]

    @property
    def spec(self) -> PolicySpec:
        """What the policy needs and gives."""
        return PolicySpec(
            state=VectorSpec(("x", "y", "vx", "vy"), ("m", "m", "m/s", "m/s")),
            goal=GoalSpec("state", length=self.config.goal_length, required=False),
            action=VectorSpec(("force_x", "force_y"), ("100 N", "100 N"), low=(-1.0, -1.0), high=(1.0, 1.0)),
            horizon=self.config.horizon,
            window=self.config.window,
            step_s=STEP_S,
            sampler=SAMPLER,
        )


def _point_maze(*, window: int, horizon: int, sigma_data: float) -> BesoConfig:
    return BesoConfig(
        state_width=4,
        action_width=2,
        width=96,
        layers=3,
        heads=4,
        window=window,
        horizon=horizon,
        sigma_data=sigma_data,
        zeroed_goal_dims=(2, 3),  # a goal is a place: it says nothing of the speed there
    )


RECIPES: Mapping[str, Recipe] = {
    "point-maze": Recipe(
        "Drives a ball through a maze to a goal: one observation in, 16 forces out, 20 a second.",
        _point_maze(window=1, horizon=16, sigma_data=0.25),
        execute=8,
        steps=12_000,
        action_noise=(DISTURBANCE.noise_std,),
    ),
    # A policy that sees its past learns to continue it rather than to look where it is: on calm play alone it reached
    # a quarter of the goals, and the more of its window it was given, the fewer. Noise breaks the tie between past and
    # present, as in DART (Laskey et al. 2017); it widens the actions too, hence the larger sigma_data.
    "point-maze-step": Recipe(
        "Drives a ball through a maze to a goal as BESO does it upstream: five observations in, one force out.",
        _point_maze(window=5, horizon=1, sigma_data=0.4),
        execute=1,
        steps=9_000,
        action_noise=(0.05, 0.2, 0.35, 0.5),
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one policy, measure it in the maze and write it down."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)  # decides the fresh weights; everything else has a stream of its own
    recipe = RECIPES[options.name]

    play = load_play(recipe, options.data)
    normalizer = Normalizer(Statistics.of(play["states"]), Statistics.of(play["intended"]))
    windows = PlayWindows(play, normalizer, recipe.config)
    spread = float(windows.actions.std())
    logger.info("%d windows; normalised actions have std %.3f (sigma_data)", len(windows), spread)

    denoise = make_denoiser(recipe.config)
    began_s = time.monotonic()
    steps = None if options.minutes else (options.steps or recipe.steps)
    taken, weights = train(denoise, windows, steps=steps, minutes=options.minutes, seed=options.seed)
    trained_min = (time.monotonic() - began_s) / 60
    denoise.load_state_dict(weights)
    denoise.eval()

    policy = Policy(BesoProgram(recipe.spec, recipe.config, normalizer), denoise, recipe.execute)
    fleet = Fleet(max(options.tasks, PICTURED))
    results = measure(policy, fleet, held_out_tasks(options.tasks, options.tasks_seed))
    results["training"] = {
        "optimiser_steps": taken,
        "batch": _BATCH,
        "minutes": round(trained_min, 1),
        "threads": options.threads,
        "seed": options.seed,
        "windows": len(windows),
        "action_std": round(spread, 3),
    }
    if options.picture:
        draw_goal_free(policy, fleet, options.picture)
    write_bundle(options.out, options.name, normalizer, weights, results)
    logger.info("%s", json.dumps(results, indent=2))


def load_play(recipe: Recipe, path: Path | None) -> Mapping[str, np.ndarray]:
    """Read play data from `path`, or collect what the recipe learns from, and keep it there if there is a path."""
    if path is not None and path.exists():
        return dict(np.load(path))
    episodes = PLAY_EPISODES // len(recipe.action_noise)
    parts = [
        collect(episodes, seed, disturbance=replace(DISTURBANCE, noise_std=noise_std))
        for seed, noise_std in enumerate(recipe.action_noise)
    ]
    play = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if path is not None:
        np.savez(path, allow_pickle=False, **play)
    return play


def train(
    denoise: Denoiser, windows: PlayWindows, *, steps: int | None, minutes: float | None, seed: int
) -> tuple[int, dict[str, Tensor]]:
    """Train in place for `steps` or for `minutes`, whichever is given.

    Returns:
        The optimiser steps taken, and the averaged weights.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(denoise.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    average = ExponentialAverage(denoise)
    denoise.train()
    began_s, taken, progress, smooth = time.monotonic(), 0, 0.0, math.nan
    with tqdm(total=steps, desc="train", unit="step", smoothing=0.05) as bar:
        while progress < 1:
            for group in optimizer.param_groups:
                group["lr"] = _PEAK_RATE * min(progress / _WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))
            batch = windows.draw(_BATCH, goal_dropout=_GOAL_DROPOUT, generator=generator)
            sigma = loglogistic(_BATCH, sigma_min=SAMPLER.sigma_min, sigma_max=SAMPLER.sigma_max, generator=generator)
            noise = torch.randn(batch.actions.shape, generator=generator)
            loss = denoise.loss(batch.actions, sigma, batch.states, batch.goal, noise=noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(denoise.parameters(), 1.0)
            optimizer.step()
            average.update(denoise)

            taken += 1
            progress = taken / steps if steps else (time.monotonic() - began_s) / (60 * (minutes or 0))
            smooth = loss.item() if math.isnan(smooth) else 0.99 * smooth + 0.01 * loss.item()
            bar.update()
            if taken % 50 == 0:
                bar.set_postfix(loss=f"{smooth:.4f}", done=f"{min(progress, 1):.0%}")
    return taken, average.shadow


def write_bundle(
    out: Path, name: str, normalizer: Normalizer, weights: Mapping[str, Tensor], results: Mapping[str, Any]
) -> None:
    """Make `out` a bundle that the server can load, of the recipe called `name`."""
    from policy_server.bundle import FORMAT, Manifest
    from policy_server.export.bundle import DEFAULT_TOLERANCE
    from policy_server.export.bundle import write_bundle as write

    recipe = RECIPES[name]
    manifest = Manifest(
        format=FORMAT,
        name=out.name,
        family="beso",
        version="1",
        description=recipe.description,
        licence="Apache-2.0",
        spec=recipe.spec,
        config=asdict(recipe.config),
        tolerance=dict(DEFAULT_TOLERANCE),
        provenance={
            "trained_by": f"python -m policy_models.beso.train {name}",
            "data": "play of a scripted expert in gymnasium-robotics PointMaze_Medium-v3, policy_sim.play",
            "paper": "Reuss et al. 2023, arXiv:2304.02532",
        },
        results=dict(results),
    )
    write(out, manifest, normalizer=normalizer, weights=weights)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=main.__doc__,
        epilog="example: python -m policy_models.beso.train point-maze -o models/zoo/point-maze --data play.npz",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("name", choices=list(RECIPES), help="which policy")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write the policy to")
    parser.add_argument(
        "--data", type=Path, help="play data (.npz) made for this policy; collected, and kept here, if there is none"
    )
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--steps", type=int, help="optimiser steps; if left out, the recipe's")
    how_long.add_argument("--minutes", type=float, help="train by the clock instead; not reproducible")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch; another number, other rounding")
    parser.add_argument("--tasks", type=int, default=200, help="held-out tasks to measure on")
    parser.add_argument("--tasks-seed", type=int, default=0, help="which tasks")
    parser.add_argument("--picture", type=Path, help="save a picture of goal-free and goal-conditioned drives here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
