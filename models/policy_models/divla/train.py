"""Trains a small DiVLA from nothing: a language model that sees a table, reasons about it and sorts what lies there."""

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
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from policy_models.diffusion.preconditioning import ExponentialAverage
from policy_models.diffusion.schedules import squaredcos_sigmas
from policy_models.divla.config import DivlaConfig, EyesConfig, LanguageConfig, UnetConfig
from policy_models.divla.dataset import Batch, Demonstrations, Sentences, statistics_of
from policy_models.divla.graphs import Read, See
from policy_models.divla.network import DivlaNetworks
from policy_models.divla.prompt import Template, Vocabulary
from policy_models.divla.tokenizer import learn_tokenizer
from policy_models.normalizer import Normalizer
from policy_models.spec import CameraSpec, GoalSpec, PolicySpec, ReasoningSpec, SamplerSpec, VectorSpec
from policy_models.training import load_or_make, read_history, training_options
from policy_sim.sorting_camera import SIZE_PX
from policy_sim.sorting_demos import Settings, collect
from policy_sim.sorting_scene import STEP_S, TOP_SPEED_M_S
from policy_sim.sorting_words import ORDERS, THOUGHTS

logger = logging.getLogger(__name__)

HORIZON, CAMERA = 16, "top"
SAMPLER = SamplerSpec("ddim_clipped", "squaredcos", 10, sigma_min=0.01, sigma_max=100.0)
EPISODES = 3000
STEPS = 8_000
_VOCABULARY = 400
_REASONING_TOKENS = 32
_BATCH, _NOISES = 64, 2  # observations of a step, and noise levels for each of them
_PEAK_RATE = 1e-3
_WARM_UP = 0.03
_WORDS = 0.3  # weight of the loss of words
_OTHERS, _SILENT = 0.3, 0.1  # parts with another's reasoning, and with none
_HELD_OUT = 50  # episodes
_CHECKPOINT_S = 180.0


def make_config() -> DivlaConfig:
    """Return the shape of the policy: Qwen2-VL's, small."""
    return DivlaConfig(
        head=UnetConfig(widths=(48, 96, 128), step_width=64),
        state_width=3,
        action_width=3,
        horizon=HORIZON,
        eyes=EyesConfig(layers=2, width=96, heads=4),
        language=LanguageConfig(
            vocabulary=_VOCABULARY,
            width=128,
            layers=3,
            heads=4,
            kv_heads=2,
            ffn_width=384,
            rope_theta=1e4,
            rope_sections=(4, 6, 6),
            context=256,
        ),
        reasoning_tokens=_REASONING_TOKENS,
        system="You sort things.",
    )


def make_spec() -> PolicySpec:
    """Return what the policy needs and gives."""
    return PolicySpec(
        action=VectorSpec(
            ("vx", "vy", "grip"),
            ("m/s", "m/s", ""),
            (-TOP_SPEED_M_S, -TOP_SPEED_M_S, -1.0),
            (TOP_SPEED_M_S,) * 2 + (1.0,),
        ),
        state=VectorSpec(("x", "y", "holding"), ("m", "m", "")),
        cameras=(CameraSpec(CAMERA, SIZE_PX, SIZE_PX, "area"),),
        goal=GoalSpec("text", examples=tuple(ORDERS)[:3], longest=200),
        horizon=HORIZON,
        step_s=STEP_S,
        sampler=SAMPLER,
        reasoning=ReasoningSpec(tokens=_REASONING_TOKENS, budget_s=2.0, every_s=0.5),
    )


def make_tokenizer() -> str:
    """Return a tokenizer learned from all that is said while sorting."""
    return learn_tokenizer([*ORDERS, *(f"{thought}Next action:" for thought in THOUGHTS)], _VOCABULARY)


class Learner(nn.Module):
    """The networks with their losses."""

    scale: Tensor  # of actions at each training step
    spread: Tensor  # of noise

    def __init__(self, networks: DivlaNetworks, config: DivlaConfig) -> None:
        super().__init__()
        self.networks = networks
        self.see = See(networks.vlm, config.eyes, SIZE_PX, SIZE_PX)
        self.read = Read(networks.vlm)
        sigma = torch.from_numpy(squaredcos_sigmas()).float()
        self.register_buffer("scale", (1 + sigma**2).rsqrt(), persistent=False)
        self.register_buffer("spread", sigma * (1 + sigma**2).rsqrt(), persistent=False)

    def forward(self, batch: Batch, silent: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the loss of noise, and that of words, scalars.

        Args:
            batch: Demonstrations.
            silent: Whose head is told of no reasoning, (B,) bool.
            generator: Of noise and its levels.
        """
        said = batch.sequences
        hidden, _, _ = self.read(said.tokens, said.places, self.see(batch.images), said.positions, said.mask)
        learned = (said.answer & batch.own[:, None])[:, 1:]
        words = F.cross_entropy(self.networks.vlm.lm_head(hidden[:, :-1][learned]), said.tokens[:, 1:][learned])
        context = self.networks.fusion(hidden, said.prefix, said.thought & ~silent[:, None])

        context, state, actions = (
            values.repeat_interleave(_NOISES, dim=0) for values in (context, batch.state, batch.actions)
        )
        timestep = torch.randint(0, len(self.scale), (len(actions),), generator=generator)
        eps = torch.randn(actions.shape, generator=generator)
        noisy = self.scale[timestep, None, None] * actions + self.spread[timestep, None, None] * eps
        return F.mse_loss(self.networks.head(noisy, timestep, context, state), eps), words


def train(
    learner: Learner,
    config: DivlaConfig,
    demonstrations: Demonstrations,
    *,
    steps: int | None,
    minutes: float | None,
    seed: int,
    checkpoint: Path,
    held_out: Demonstrations,
    rate: float = _PEAK_RATE,
    history: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Train in place for `steps` or for `minutes`, whichever is given; averaged weights go to `checkpoint`."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    average = ExponentialAverage(learner.networks)
    learner.train()
    began_s = saved_s = time.monotonic()
    taken, progress, smooth = 0, 0.0, np.full(2, math.nan)
    with tqdm(total=steps, desc="train", unit="step", smoothing=0.05, mininterval=5) as bar:
        while progress < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(progress / _WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))
            silent = torch.from_numpy(rng.random(_BATCH) < _SILENT)
            noise, words = learner(demonstrations.draw(_BATCH, _OTHERS, rng), silent, generator)
            optimizer.zero_grad()
            (noise + _WORDS * words).backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            average.update(learner.networks)

            taken += 1
            now_s = time.monotonic()
            progress = taken / steps if steps else (now_s - began_s) / (60 * (minutes or 0))
            losses = np.array((noise.item(), words.item()))
            smooth = losses if np.isnan(smooth).any() else 0.99 * smooth + 0.01 * losses
            bar.update()
            if taken % 20 == 0:
                bar.set_postfix(noise=f"{smooth[0]:.4f}", words=f"{smooth[1]:.4f}")
            if progress >= 1 or now_s - saved_s > _CHECKPOINT_S:
                saved_s = now_s
                facts: dict[str, Any] = {"optimiser_steps": taken, "minutes": round((now_s - began_s) / 60, 1)}
                facts |= {"batch": _BATCH, "peak_rate": rate, "seed": seed, "losses": smooth.round(4).tolist()}
                facts["held_out_losses"] = held_out_losses(config, average.shadow, held_out)
                logger.info("%s", facts)
                save_file(_untied(average.shadow), checkpoint, {"training": json.dumps([*history, facts])})


@torch.no_grad()
def held_out_losses(config: DivlaConfig, weights: Mapping[str, Tensor], held_out: Demonstrations) -> list[float]:
    """Return both losses of `weights` on every held-out observation, always with the same noise."""
    judge = Learner(DivlaNetworks.of(config, _untied(weights)), config).eval()
    generator, parts = torch.Generator().manual_seed(0), []
    for rows in np.array_split(np.arange(len(held_out)), math.ceil(len(held_out) / 128)):
        batch = held_out.batch(rows, np.zeros(len(rows), dtype=bool))
        losses = judge(batch, torch.zeros(len(rows), dtype=torch.bool), generator)
        parts.append([len(rows) * loss.item() for loss in losses])
    return (np.sum(parts, axis=0) / len(held_out)).round(4).tolist()


def _untied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the output layer of the language model, which is its embedding."""
    return {name: value.contiguous() for name, value in weights.items() if name != "vlm.lm_head.weight"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a small DiVLA on sorting, write it as a bundle, and measure it.

    Without --data, a scripted expert first demonstrates (a few minutes), and says what it thinks. Image tower, language
    model and head are trained together, from nothing. Averaged weights are saved beside the bundle every three minutes,
    as OUT.training.safetensors; should anything stop the training, --weights takes it from there to the bundle.

    Example: python -m policy_models.divla.train -o models/zoo/sorting --data demos.npz --minutes 45
    """
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)  # decides the fresh weights; everything else has a stream of its own

    config, spec, tokenizer = make_config(), make_spec(), make_tokenizer()
    checkpoint = options.weights or options.out.with_suffix(".training.safetensors")
    demos = load_or_make(options.data, lambda: collect(EPISODES, Settings(), jobs=options.jobs))
    normalizer = statistics_of(demos, spec.action.low, spec.action.high)
    if options.weights is None:
        vocabulary = Vocabulary(tokenizer)
        template = Template(vocabulary, config, images=1, height=SIZE_PX, width=SIZE_PX)
        sentences = Sentences(template, vocabulary, demos)
        seen, unseen = split(demos, _HELD_OUT)
        networks = DivlaNetworks(config)
        history = []
        if options.resume:
            networks.load(load_file(options.resume))
            history = read_history(options.resume)
        learner = Learner(networks, config)
        count = sum(p.numel() for p in networks.parameters())
        logger.info("%.2f million parameters, %d observations", count / 1e6, len(seen["image"]))
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        train(
            learner,
            config,
            Demonstrations(seen, sentences, normalizer),
            steps=None if options.minutes else options.steps,
            minutes=options.minutes,
            seed=options.seed,
            rate=options.rate,
            checkpoint=checkpoint,
            held_out=Demonstrations(unseen, sentences, normalizer),
            history=history,
        )
    results: dict[str, Any] = {"training": read_history(checkpoint)}
    write_bundle(options.out, config, spec, tokenizer, normalizer, load_file(checkpoint), results)


def split(demos: Mapping[str, np.ndarray], held_out: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Return the demonstrations without the last `held_out` episodes, and those alone; nothing is copied."""
    first = int(demos["bounds"][-1 - held_out])
    rows = {name: values for name, values in demos.items() if len(values) == demos["bounds"][-1]}
    return (
        {**demos, **{name: values[:first] for name, values in rows.items()}},
        {**demos, **{name: values[first:] for name, values in rows.items()}},
    )


def write_bundle(
    out: Path,
    config: DivlaConfig,
    spec: PolicySpec,
    tokenizer: str,
    normalizer: Normalizer,
    weights: Mapping[str, Tensor],
    results: Mapping[str, Any],
) -> None:
    """Make `out` a bundle that the server can load."""
    from policy_server.bundle import FORMAT, Manifest
    from policy_server.export.bundle import DEFAULT_TOLERANCE
    from policy_server.export.bundle import write_bundle as write

    manifest = Manifest(
        format=FORMAT,
        name=out.name,
        family="divla",
        version="1",
        description="Sorts cubes, balls, rings and bars into two bins as it is told, and says what it thinks.",
        licence="Apache-2.0",
        spec=spec,
        config=asdict(config),
        tolerance=dict(DEFAULT_TOLERANCE),
        provenance={
            "trained_by": "python -m policy_models.divla.train",
            "data": "a scripted expert that says what it thinks, under noise, policy_sim.sorting_demos",
            "paper": "Wen et al. 2024, arXiv:2412.03293",
        },
        results=dict(results),
    )
    write(out, manifest, normalizer=normalizer, weights=weights, tokenizer=tokenizer)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = training_options(main, steps=STEPS, rate=_PEAK_RATE, threads=2)
    parser.add_argument("--jobs", type=int, default=1, help="processes that demonstrate (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
