"""Trains CAD2RL policies: views of simulated spaces in, a policy with its measured results out."""

import argparse
import inspect
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from policy_models.cad2rl.checkpoint import load_features
from policy_models.cad2rl.config import Cad2rlConfig, Head, small
from policy_models.cad2rl.dataset import Batch, Views, at, read_views
from policy_models.cad2rl.network import CollisionNetwork, LeftRightStraight, make_network
from policy_models.cad2rl.steering import limits
from policy_models.directions import CollisionSpec
from policy_models.spec import CameraSpec, PolicySpec, VectorSpec
from policy_models.training import read_history

logger = logging.getLogger(__name__)

STEP_S = 0.1
HELD_OUT = 500  # views

_BATCH = 64
_WARM_UP = 0.03  # of each stage
_CHECKPOINT_S = 60.0

Loss = Callable[[CollisionNetwork, Batch], Tensor]


def free_space_loss(network: CollisionNetwork, batch: Batch) -> Tensor:
    """Return the cross-entropy of every direction with whether its first metre is blocked, a scalar."""
    return F.binary_cross_entropy_with_logits(_logits(network, batch.images), 1 - batch.free)


def rollout_loss(network: CollisionNetwork, batch: Batch) -> Tensor:
    """Return the cross-entropy of the directions tried with what came of them, a scalar.

    This is Monte Carlo policy evaluation: the targets are returns of whole flights, and nothing is bootstrapped.
    """
    return F.binary_cross_entropy_with_logits(at(_logits(network, batch.images), batch.bins), batch.collided)


def choice_loss(network: CollisionNetwork, batch: Batch) -> Tensor:
    """Return the cross-entropy of left, straight and right with the one to choose, a scalar."""
    with torch.autocast("cpu", torch.bfloat16):
        choices = cast(LeftRightStraight, network).choices(batch.images).float()
    return F.cross_entropy(choices, best_choices(batch.free))


def _logits(network: CollisionNetwork, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):  # convolutions take half the time
        return network.logits(images).float()


def best_choices(free: Tensor) -> Tensor:
    """Return 0 for left, 1 for straight or 2 for right, (B,): the freest third of the view, straight if in doubt.

    Args:
        free: Whether the first metre of each direction is free, (B, rows, columns).
    """
    shares = torch.stack([third.mean((-1, -2)) for third in free.tensor_split(3, dim=-1)], dim=-1)
    return (shares + torch.tensor([0.0, 0.05, 0.0])).argmax(-1)


@dataclass(frozen=True)
class Stage:
    """A part of a training.

    Attributes:
        name: What it is called.
        loss: What it reduces.
        share: Of the steps or the minutes.
        rate: Peak of the learning rate.
    """

    name: str
    loss: Loss
    share: float
    rate: float


@dataclass(frozen=True)
class Recipe:
    """One way to a policy.

    Attributes:
        stages: One after the other.
        randomise: What is randomised in the views that it wants: see `policy_sim.flights_views`.
        head: Of the network.
    """

    stages: tuple[Stage, ...]
    randomise: str = "all"
    head: Head = "grid"


_BOTH = (
    Stage("free space", free_space_loss, share=0.25, rate=2e-3),
    Stage("rollouts", rollout_loss, share=0.75, rate=1.5e-3),
)
RECIPES: Mapping[str, Recipe] = {
    "cad2rl": Recipe(_BOTH),
    "textures": Recipe(_BOTH, randomise="textures"),
    "none": Recipe(_BOTH, randomise="none"),
    "free-space": Recipe((Stage("free space", free_space_loss, share=1.0, rate=2e-3),)),
    "left-right-straight": Recipe((Stage("choices", choice_loss, share=1.0, rate=2e-3),), head="left-right-straight"),
}


def make_spec(config: Cad2rlConfig, directions: CollisionSpec) -> PolicySpec:
    """Return what a policy with these directions needs and gives."""
    low, high = limits(config.steering)
    return PolicySpec(
        action=VectorSpec(("forward", "left", "up", "yaw_rate"), ("m/s", "m/s", "m/s", "rad/s"), low, high),
        cameras=(CameraSpec(directions.camera, config.image, config.image, "area"),),
        horizon=1,
        step_s=STEP_S,
        collision=directions,
    )


def train(
    network: CollisionNetwork,
    views: Views,
    stages: Sequence[Stage],
    *,
    steps: int | None,
    minutes: float | None,
    seed: int,
    batch: int = _BATCH,
    checkpoint: Path | None = None,
    held_out: Views | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> int:
    """Train in place, all stages together for `steps` or for `minutes`, whichever is given.

    Args:
        network: With fresh weights, or those of an earlier training.
        views: What to learn from.
        stages: See `Stage`.
        steps: Optimiser steps, or None.
        minutes: Wall-clock time, or None.
        seed: Of batches and augmentation.
        batch: Views of one step.
        checkpoint: The weights are saved here every minute, and after each stage.
        held_out: Views whose loss is logged beside each checkpoint.
        history: Facts about earlier trainings of the same weights, to be saved with them.

    Returns:
        The optimiser steps taken.
    """
    rng = np.random.default_rng(seed)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    facts: list[Mapping[str, Any]] = list(history)
    total = 0
    for stage in stages:
        optimizer = torch.optim.AdamW(network.parameters(), lr=stage.rate, weight_decay=1e-4)
        began_s = saved_s = time.monotonic()
        budget = math.ceil(stage.share * steps) if steps else None
        taken, progress, smooth = 0, 0.0, math.nan
        network.train()
        with tqdm(total=budget, desc=stage.name, unit="step", smoothing=0.05, mininterval=5) as bar:
            while progress < 1:
                for group in optimizer.param_groups:
                    group["lr"] = stage.rate * min(progress / _WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))
                loss = stage.loss(network, views.draw(batch, rng))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()

                taken += 1
                now_s = time.monotonic()
                progress = taken / budget if budget else (now_s - began_s) / (60 * stage.share * (minutes or 1e-9))
                smooth = loss.item() if math.isnan(smooth) else 0.99 * smooth + 0.01 * loss.item()
                bar.update()
                if taken % 20 == 0:
                    bar.set_postfix(loss=f"{smooth:.4f}")
                if checkpoint and (progress >= 1 or now_s - saved_s > _CHECKPOINT_S):
                    saved_s = now_s
                    fact: dict[str, Any] = {"stage": stage.name, "optimiser_steps": taken, "batch": batch}
                    fact |= {"minutes": round((now_s - began_s) / 60, 1), "peak_rate": stage.rate, "seed": seed}
                    fact["loss"] = round(smooth, 4)
                    if held_out is not None:
                        fact["held_out_loss"] = round(held_out_loss(network, held_out, stage.loss), 4)
                    logger.info("%s", fact)
                    _save(network, checkpoint, [*facts, fact])
        if checkpoint:
            facts = list(read_history(checkpoint))
        total += taken
    return total


@torch.no_grad()
def held_out_loss(network: CollisionNetwork, held_out: Views, loss: Loss) -> float:
    """Return the loss on every held-out view as the camera saw it."""
    was_training = network.training
    network.eval()
    parts = [
        len(rows) * loss(network, held_out.batch(rows)).item()
        for rows in np.array_split(held_out.rows, math.ceil(len(held_out) / 128))
    ]
    network.train(was_training)
    return sum(parts) / len(held_out)


def _save(network: CollisionNetwork, path: Path, facts: Sequence[Mapping[str, Any]]) -> None:
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, path, {"training": json.dumps(list(facts))})


def write_bundle(
    out: Path,
    config: Cad2rlConfig,
    directions: CollisionSpec,
    weights: Mapping[str, Tensor],
    *,
    data: str,
    results: Mapping[str, Any],
) -> None:
    """Make `out` a bundle that the server can load."""
    from policy_server.bundle import FORMAT, Manifest
    from policy_server.export.bundle import DEFAULT_TOLERANCE
    from policy_server.export.bundle import write_bundle as write

    manifest = Manifest(
        format=FORMAT,
        name=out.name,
        family="cad2rl",
        version="1",
        description="Flies where one image promises no collision, and says how likely one is in every direction.",
        licence="Apache-2.0",
        spec=make_spec(config, directions),
        config=asdict(config),
        # Choosing a direction is all or nothing: a rounding to bfloat16 may choose another one that is as good.
        tolerance={"f32": DEFAULT_TOLERANCE["f32"]},
        provenance={
            "trained_by": "python -m policy_models.cad2rl.train",
            "data": data,
            "paper": "Sadeghi and Levine 2017, arXiv:1611.04201",
        },
        results=dict(results),
    )
    write(out, manifest, weights=weights)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a collision avoider on views of simulated spaces, and write it as a bundle.

    First it learns which directions are free for a metre, then what flights that began in some of them came to. The
    weights are saved beside the bundle every minute, as OUT.training.safetensors; --resume goes on from them, --weights
    only makes the bundle. policy_models.cad2rl.evaluate then measures it.

    Example: python -m policy_models.cad2rl.train cad2rl --views views.npz -o models/zoo/cad2rl --minutes 10
    """
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)  # decides the fresh weights; batches have a stream of their own

    recipe, views = RECIPES[options.recipe], read_views(options.views)
    grid = views.directions
    if views.settings["randomise"] != recipe.randomise:
        raise SystemExit(
            f"{options.views} has {views.settings['randomise']!r} randomised, "
            f"the recipe {options.recipe!r} wants {recipe.randomise!r}"
        )
    config = small(image=views.settings["px"], rows=grid.rows, columns=grid.columns, head=recipe.head)
    checkpoint = options.weights
    if checkpoint is None:
        network = make_network(config)
        if options.features:
            load_features(network, options.features)
        if options.resume:
            network.load_state_dict(load_file(options.resume))
        seen, unseen = views.split(min(HELD_OUT, len(views) // 5))
        count = sum(p.numel() for p in network.parameters())
        logger.info("%.2f million parameters, %d views to learn from", count / 1e6, len(seen))
        checkpoint = options.out.with_suffix(".training.safetensors")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        train(
            network,
            seen,
            recipe.stages,
            steps=None if options.minutes else options.steps,
            minutes=options.minutes,
            seed=options.seed,
            batch=options.batch,
            checkpoint=checkpoint,
            held_out=unseen,
            history=read_history(options.resume) if options.resume else (),
        )
    results = {"recipe": options.recipe, "training": read_history(checkpoint)}
    data = f"{len(views)} views of policy_sim.flights_views, randomised: {recipe.randomise}"
    write_bundle(options.out, config, grid, load_file(checkpoint), data=data, results=results)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(main), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=RECIPES, help="what to train")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write the policy to")
    parser.add_argument("--views", type=Path, required=True, help="made by python -m policy_sim.flights_views")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--steps", type=int, default=3000, help="optimiser steps (default: %(default)s)")
    how_long.add_argument("--minutes", type=float, help="train by the clock instead; not reproducible")
    how_long.add_argument("--weights", type=Path, help="do not train; take these for the bundle")
    parser.add_argument("--resume", type=Path, help="begin with these weights, saved by an earlier training")
    parser.add_argument("--features", type=Path, help="begin with a torchvision VGG's features that fit the network")
    parser.add_argument("--batch", type=int, default=_BATCH, help="views of one step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
