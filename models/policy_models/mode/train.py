"""Trains the MoDE policy that ships with the project: demonstrations in, a policy with its measured results out."""

import argparse
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from policy_models.diffusion.preconditioning import ExponentialAverage, loglogistic
from policy_models.mode.assembly import ModeNetworks
from policy_models.mode.config import ImageConfig, ModeConfig, TextConfig, TransformerConfig
from policy_models.mode.dataset import CAMERAS, NO_AUGMENTATION, Augmentation, Batch, Demonstrations, Phrases, split
from policy_models.mode.network import ModeDiT, chosen
from policy_models.mode.tokenizer import learn_merges, make_tokenizer
from policy_models.normalizer import Normalizer, Statistics
from policy_models.spec import CameraSpec, GoalSpec, PolicySpec, SamplerSpec, VectorSpec
from policy_models.training import load_or_make, read_history, training_options
from policy_sim.meta_world import SIZE_PX, STEP_S
from policy_sim.meta_world_demos import Settings, collect
from policy_sim.meta_world_tasks import TASKS

logger = logging.getLogger(__name__)

HORIZON = 10
SAMPLER = SamplerSpec(sampler="ddim", schedule="exponential", steps=10, sigma_min=0.001, sigma_max=80.0)
EPISODES_PER_TASK = 100
STEPS = 10_000

_MERGES = 120
_BATCH = 64
_PEAK_RATE = 1e-3
_WARM_UP = 0.03  # of the training
_GOAL_DROPOUT = 0.1
_BALANCE = 0.01
_WORDS = 0.1
_WORDS_TEMPERATURE = 0.1
_HELD_OUT_PER_TASK = 4  # episodes that tell how well unseen ones are predicted
_CHECKPOINT_S = 180.0


def make_config(tokenizer: str) -> ModeConfig:
    """Return the shape of the policy, for a tokenizer's vocabulary."""
    vocabulary = Tokenizer.from_str(tokenizer).get_vocab_size()
    return ModeConfig(
        TransformerConfig(
            action_width=4, horizon=HORIZON, width=96, layers=4, heads=4, goal_width=64, token_width=128, sigma_data=0.7
        ),
        ImageConfig("resnet18", channels=16),
        text=TextConfig(vocabulary, width=64, layers=2, heads=4, context=24, projection=64),
    )


def make_spec() -> PolicySpec:
    """Return what the policy needs and gives."""
    return PolicySpec(
        action=VectorSpec(("dx", "dy", "dz", "gripper"), ("cm", "cm", "cm", ""), (-1.0,) * 4, (1.0,) * 4),
        cameras=tuple(CameraSpec(camera, SIZE_PX, SIZE_PX, "area") for camera in CAMERAS),
        goal=GoalSpec("text", examples=tuple(task.phrases[0] for task in TASKS.values())),
        horizon=HORIZON,
        step_s=STEP_S,
        sampler=SAMPLER,
    )


def train(
    networks: ModeNetworks,
    demonstrations: Demonstrations,
    *,
    steps: int | None,
    minutes: float | None,
    seed: int,
    rate: float = _PEAK_RATE,
    batch: int = _BATCH,
    checkpoint: Path | None = None,
    held_out: Demonstrations | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> tuple[int, dict[str, Tensor]]:
    """Train in place for `steps` or for `minutes`, whichever is given.

    Args:
        networks: With fresh weights.
        demonstrations: What to learn from.
        steps: Optimiser steps, or None.
        minutes: Wall-clock time, or None.
        seed: Of batches, augmentation and noise.
        rate: Peak of the learning rate.
        batch: Observations of one step.
        checkpoint: The averaged weights are saved here every few minutes, and at the end.
        held_out: Observations whose loss is logged beside each checkpoint.
        history: Facts about earlier trainings of the same weights, to be saved with them.

    Returns:
        The optimiser steps taken, and the averaged weights.
    """
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    networks.perceive.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(networks.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    average = ExponentialAverage(networks)
    networks.train()
    began_s = saved_s = time.monotonic()
    taken, progress, smooth = 0, 0.0, math.nan
    with tqdm(total=steps, desc="train", unit="step", smoothing=0.05, mininterval=5) as bar:
        while progress < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(progress / _WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))
            drawn = demonstrations.draw(batch, Augmentation(), rng)
            loss, balance, words = losses(networks, drawn, demonstrations.phrases, generator)
            optimizer.zero_grad()
            (loss + _BALANCE * balance + _WORDS * words).backward()
            torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
            optimizer.step()
            average.update(networks)

            taken += 1
            now_s = time.monotonic()
            progress = taken / steps if steps else (now_s - began_s) / (60 * (minutes or 0))
            smooth = loss.item() if math.isnan(smooth) else 0.99 * smooth + 0.01 * loss.item()
            bar.update()
            if taken % 20 == 0:
                bar.set_postfix(loss=f"{smooth:.4f}", balance=f"{balance:.3f}", words=f"{words:.3f}")
            if checkpoint and (progress >= 1 or now_s - saved_s > _CHECKPOINT_S):
                saved_s = now_s
                minutes_taken = round((now_s - began_s) / 60, 1)
                facts: dict[str, Any] = {"optimiser_steps": taken, "minutes": minutes_taken, "batch": batch}
                facts |= {"peak_rate": rate, "seed": seed, "loss": round(smooth, 4)}
                if held_out:
                    facts["held_out_loss"] = round(held_out_loss(networks, average.shadow, held_out), 4)
                logger.info("%s", facts)
                weights = {name: value.contiguous() for name, value in average.shadow.items()}
                save_file(weights, checkpoint, {"training": json.dumps([*history, facts])})
    return taken, average.shadow


def losses(
    networks: ModeNetworks, batch: Batch, phrases: Phrases, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the EDM loss, the load-balancing loss and the loss of words of one batch, scalars.

    While training, experts are drawn by their probability, without replacement, so that all are tried; otherwise the
    most probable ones are taken. The balancing loss is the sum over experts of share used times mean probability,
    times their number: 1 where all are used alike (Fedus et al. 2021, eq. 4).
    """
    denoiser = networks.denoiser
    network = denoiser.inner_model
    assert isinstance(network, ModeDiT) and networks.language is not None
    top_k, count = network.config.top_k, len(batch.actions)

    embedded = networks.language(phrases.tokens)
    goal = embedded[batch.phrase]
    with torch.autocast("cpu", torch.bfloat16):  # for the convolutions it is the faster; the rest is as fast without
        tokens = networks.perceive(goal, *batch.images).float()
    sigma = loglogistic(count, sigma_min=SAMPLER.sigma_min, sigma_max=SAMPLER.sigma_max, generator=generator)
    noise = torch.randn(batch.actions.shape, generator=generator)
    if networks.training:
        # The whole goal, and for the transformer alone: that is what guidance asks about.
        dropped = torch.rand(count, generator=generator) < _GOAL_DROPOUT
        goal = goal.masked_fill(dropped[:, None], 0.0)
    probabilities = network.probabilities(sigma, goal)
    if networks.training:
        drawn = torch.multinomial(probabilities.detach().flatten(0, 1), top_k, generator=generator)
        indices = drawn.unflatten(0, (count, -1))
    else:
        indices = probabilities.topk(top_k).indices
    route = chosen(probabilities, indices)
    loss = denoiser.loss(batch.actions, sigma, tokens, goal, route, noise=noise)
    used = (route > 0).float().mean(0) / top_k
    balance = network.config.experts * (used * probabilities.mean(0)).sum(-1).mean()
    return loss, balance, told_apart(embedded, phrases.tasks)


def told_apart(embedded: Tensor, tasks: Tensor) -> Tensor:
    """Return how badly instructions, (phrases, G), sort by their tasks, (phrases,): supervised contrast, a scalar.

    Khosla et al. 2020, with the sum inside the logarithm. Without it a phrase may settle among those of another task:
    a small text tower saturates early, and a handful of wrong phrases hardly shows in the loss of the actions.
    """
    directions = torch.nn.functional.normalize(embedded, dim=-1)
    alike = (directions @ directions.T / _WORDS_TEMPERATURE).masked_fill(torch.eye(len(tasks)).bool(), -torch.inf)
    of_the_same_task = alike.masked_fill(tasks[:, None] != tasks, -torch.inf)
    return (alike.logsumexp(-1) - of_the_same_task.logsumexp(-1)).mean()


@torch.no_grad()
def held_out_loss(networks: ModeNetworks, weights: Mapping[str, Tensor], held_out: Demonstrations) -> float:
    """Return the EDM loss of `weights` on every held-out observation, always with the same noise."""
    judge = ModeNetworks(networks.config, list(networks.perceive.encoders))
    judge.load_state_dict(weights, assign=True)
    judge.eval()
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    parts = []
    for rows in np.array_split(held_out.rows, math.ceil(len(held_out) / 128)):
        batch = held_out.batch(rows, NO_AUGMENTATION, rng)
        parts.append(len(rows) * losses(judge, batch, held_out.phrases, generator)[0].item())
    return sum(parts) / len(held_out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a language-conditioned MoDE policy on Meta-World, write it as a bundle, and measure it.

    Without --data, Meta-World's scripted experts first demonstrate six tasks (a few minutes). Text tower, image
    encoders and transformer are trained together, from nothing. Averaged weights are saved beside the bundle every
    three minutes, as OUT.training.safetensors; should anything stop the training, --weights takes it from there to the
    bundle. At the end the policy is played closed-loop through ONNX Runtime, and what came of it is written into the
    bundle's policy.yaml.

    Example: python -m policy_models.mode.train -o models/zoo/meta-world --data demos.npz --minutes 45
    """
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)  # decides the fresh weights; everything else has a stream of its own

    tokenizer = make_tokenizer(learn_merges([phrase for task in TASKS.values() for phrase in task.phrases], _MERGES))
    config = make_config(tokenizer)
    assert config.text is not None
    checkpoint = options.weights
    if checkpoint is None:
        demos = load_or_make(options.data, lambda: collect(EPISODES_PER_TASK, Settings(), jobs=options.jobs))
        phrases = Phrases([str(name) for name in demos["task_names"]], tokenizer, config.text)
        seen, unseen = split(demos["episode"], _HELD_OUT_PER_TASK, demos["task"])
        demonstrations, held_out = (
            Demonstrations(demos, phrases, horizon=HORIZON, rows=rows) for rows in (seen, unseen)
        )
        networks = ModeNetworks(config, CAMERAS)
        networks.materialize()
        if options.resume:
            networks.load_state_dict(load_file(options.resume))
        count, spread = sum(p.numel() for p in networks.parameters()), demonstrations.actions.std()
        logger.info("%.2f million parameters, %d observations", count / 1e6, len(demonstrations))
        logger.info("actions have std %.3f, sigma_data is %g", spread, config.transformer.sigma_data)
        checkpoint = options.out.with_suffix(".training.safetensors")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        steps = None if options.minutes else options.steps
        train(
            networks,
            demonstrations,
            steps=steps,
            minutes=options.minutes,
            seed=options.seed,
            rate=options.rate,
            checkpoint=checkpoint,
            held_out=held_out,
            history=read_history(options.resume) if options.resume else (),
        )

    weights = load_file(checkpoint)
    results: dict[str, Any] = {"training": read_history(checkpoint)}
    write_bundle(options.out, config, tokenizer, weights, results)
    if options.episodes:
        from policy_models.mode.evaluate import conditions_of, measure, table

        conditions = list(conditions_of(options.out, "onnx").values())
        measured = measure(conditions, options.episodes, jobs=options.jobs)
        logger.info("%s", table(measured))
        results |= {"episodes_per_task": options.episodes, "conditions": measured}
        write_bundle(options.out, config, tokenizer, weights, results)


def write_bundle(
    out: Path, config: ModeConfig, tokenizer: str, weights: Mapping[str, Tensor], results: Mapping[str, Any]
) -> None:
    """Make `out` a bundle that the server can load."""
    from policy_server.bundle import FORMAT, Manifest
    from policy_server.export.bundle import DEFAULT_TOLERANCE
    from policy_server.export.bundle import write_bundle as write

    spec = make_spec()
    ends = Statistics((0.0,) * 4, (1.0,) * 4, spec.action.low, spec.action.high)
    manifest = Manifest(
        format=FORMAT,
        name=out.name,
        family="mode",
        version="1",
        description="Opens and closes a drawer, a faucet and a window as it is told, from two cameras (Meta-World).",
        licence="Apache-2.0",
        spec=spec,
        config=asdict(config),
        tolerance={**DEFAULT_TOLERANCE, "int8": 5e-2},
        provenance={
            "trained_by": "python -m policy_models.mode.train",
            "data": "Meta-World's scripted experts under noise, policy_sim.meta_world_demos",
            "paper": "Reuss et al. 2024, arXiv:2412.12953",
        },
        results=dict(results),
    )
    # Actions are learned in the robot's units; all that is left to do is to keep them within their limits.
    normalizer = Normalizer(Statistics((), (), (), ()), ends, state_scaling="none", action_scaling="none", clip=1.0)
    write(out, manifest, normalizer=normalizer, weights=weights, tokenizer=tokenizer)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = training_options(main, steps=STEPS, rate=_PEAK_RATE, threads=1)
    parser.add_argument(
        "--episodes", type=int, default=50, help="to play of each task and condition; 0 for none (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that play episodes (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
