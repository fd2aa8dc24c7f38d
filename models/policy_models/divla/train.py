"""Trains a small DiVLA from nothing: a language model that sees a table, reasons about it and sorts what lies there."""

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from policy_models.diffusion.preconditioning import ExponentialAverage
from policy_models.divla.config import DivlaConfig, EyesConfig, LanguageConfig, UnetConfig
from policy_models.divla.dataset import Demonstrations, Sentences, statistics_of
from policy_models.divla.learner import Learner
from policy_models.divla.network import DivlaNetworks
from policy_models.divla.prompt import Template, Vocabulary
from policy_models.divla.tokenizer import learn_tokenizer
from policy_models.normalizer import Normalizer
from policy_models.spec import CameraSpec, GoalSpec, PolicySpec, ReasoningSpec, SamplerSpec, VectorSpec
from policy_models.training import load_or_make, read_history, training_options
from policy_sim.sorting_camera import SIZE_PX
from policy_sim.sorting_demos import Settings, collect
from policy_sim.sorting_scene import STEP_S, TOP_SPEED_M_S
from policy_sim.sorting_words import ORDERS, THINGS, THOUGHTS

logger = logging.getLogger(__name__)

HORIZON, CAMERA = 16, "top"
SAMPLER = SamplerSpec("ddim_clipped", "squaredcos", 10, sigma_min=0.01, sigma_max=100.0)
EPISODES = 3000
STEPS = 8_000
_VOCABULARY = 400
_REASONING_TOKENS = 32
_BATCH = 32
_PEAK_RATE = 1e-3
_EYES_RATE = 2.0  # of the peak: there is less to upset
_EYES = 0.25  # part of the training in which the eyes learn alone
_WARM_UP = 0.03
_WORDS, _FOUND = 0.3, 0.05  # weights of the losses of words and of finding
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


@dataclass
class Pace:
    """How far a stage of the training has come, by steps or by the clock."""

    steps: int | None
    minutes: float | None
    taken: int = 0
    began_s: float = field(default_factory=time.monotonic)

    @property
    def minutes_taken(self) -> float:
        """Since it began."""
        return (time.monotonic() - self.began_s) / 60

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return self.taken / self.steps if self.steps else self.minutes_taken / (self.minutes or 0)

    def part(self, share: float) -> "Pace":
        """Return the pace of a stage that takes a share of this."""
        return Pace(self.steps and max(1, round(share * self.steps)), self.minutes and share * self.minutes)


def train(
    learner: Learner,
    config: DivlaConfig,
    demonstrations: Demonstrations,
    *,
    pace: Pace,
    seed: int,
    checkpoint: Path,
    held_out: Demonstrations,
    rate: float = _PEAK_RATE,
    history: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Train in place, the eyes alone first unless there is a `history`; averaged weights go to `checkpoint`."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    learner.train()

    def find() -> tuple[Tensor, Tensor]:
        loss = learner.find(demonstrations.draw(_BATCH, 0.0, rng))
        return loss, loss[None]

    eyes = 0.0 if history else _EYES
    if eyes:
        for stage, smooth in _descend(learner, pace.part(eyes), _EYES_RATE * rate, "eyes", find):
            history = [_facts("eyes", stage, _EYES_RATE * rate, seed, smooth)]

    def losses() -> tuple[Tensor, Tensor]:
        silent = torch.from_numpy(rng.random(_BATCH) < _SILENT)
        each = learner(demonstrations.draw(_BATCH, _OTHERS, rng), silent, generator)
        return each @ torch.tensor((1.0, _WORDS, _FOUND)), each

    average, saved_s = ExponentialAverage(learner.networks), time.monotonic()
    for stage, smooth in _descend(learner, pace.part(1 - eyes), rate, "train", losses):
        average.update(learner.networks)
        if stage.progress >= 1 or time.monotonic() - saved_s > _CHECKPOINT_S:
            saved_s = time.monotonic()
            facts = _facts("all", stage, rate, seed, smooth)
            facts["held_out_losses"] = held_out_losses(learner, config, average.shadow, held_out)
            logger.info("%s", facts)
            save_file(_untied(average.shadow), checkpoint, {"training": json.dumps([*history, facts])})


def _facts(name: str, stage: Pace, rate: float, seed: int, losses: np.ndarray) -> dict[str, Any]:
    return {
        "stage": name,
        "optimiser_steps": stage.taken,
        "minutes": round(stage.minutes_taken, 1),
        "batch": _BATCH,
        "peak_rate": rate,
        "seed": seed,
        "losses": losses.round(4).tolist(),
    }


def _descend(
    learner: Learner, pace: Pace, rate: float, name: str, losses: Callable[[], tuple[Tensor, Tensor]]
) -> Iterator[tuple[Pace, np.ndarray]]:
    """Take optimiser steps on what `losses` returns, a sum and its parts; yield after each, with smoothed parts."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    smooth: np.ndarray | None = None
    with tqdm(total=pace.steps, desc=name, unit="step", smoothing=0.05, mininterval=5) as bar:
        while (progress := pace.progress) < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(progress / _WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))
            total, parts = losses()
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            pace.taken += 1
            values = parts.detach().numpy()
            smooth = values if smooth is None else 0.99 * smooth + 0.01 * values
            bar.update()
            if pace.taken % 20 == 0:
                bar.set_postfix(losses=" ".join(f"{value:.4f}" for value in smooth))
            yield pace, smooth


@torch.no_grad()
def held_out_losses(
    learner: Learner, config: DivlaConfig, weights: Mapping[str, Tensor], held_out: Demonstrations
) -> list[float]:
    """Return all losses of `weights` on every held-out observation, always with the same noise."""
    judge = Learner(DivlaNetworks.of(config, _untied(weights)), config, SIZE_PX, len(THINGS)).eval()
    judge.finder = learner.finder
    generator, parts = torch.Generator().manual_seed(0), []
    for rows in np.array_split(np.arange(len(held_out)), math.ceil(len(held_out) / 128)):
        batch = held_out.batch(rows, np.zeros(len(rows), dtype=bool))
        losses = judge(batch, torch.zeros(len(rows), dtype=torch.bool), generator)
        parts.append(len(rows) * losses.numpy())
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
        learner = Learner(networks, config, SIZE_PX, len(THINGS))
        count = sum(p.numel() for p in networks.parameters())
        logger.info("%.2f million parameters, %d observations", count / 1e6, len(seen["image"]))
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        train(
            learner,
            config,
            Demonstrations(seen, sentences, normalizer),
            pace=Pace(None if options.minutes else options.steps, options.minutes),
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
