"""What training scripts of policies with demonstrations have in common: their options, and what checkpoints tell."""

import argparse
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

History = list[dict[str, Any]]


def training_options(main: Callable[..., None], *, steps: int, rate: float, threads: int) -> argparse.ArgumentParser:
    """Return the parser of a training script.

    Args:
        main: Whose docstring says what the script does.
        steps: Default optimiser steps.
        rate: Default peak of the learning rate.
        threads: Default threads of torch.
    """
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(main), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write the policy to")
    parser.add_argument("--data", type=Path, help="demonstrations (.npz); made, and kept here, if there are none")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--steps", type=int, default=steps, help="optimiser steps (default: %(default)s)")
    how_long.add_argument("--minutes", type=float, help="train by the clock instead; not reproducible")
    how_long.add_argument("--weights", type=Path, help="do not train; take these for the bundle")
    parser.add_argument("--resume", type=Path, help="begin with these weights, saved by an earlier training")
    parser.add_argument("--rate", type=float, default=rate, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads of torch (default: %(default)s)")
    return parser


def load_or_make(path: Path | None, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Read demonstrations from `path`, or make them, and keep them there if there is a path."""
    if path is not None and path.exists():
        return dict(np.load(path))
    demos = make()
    if path is not None:
        np.savez_compressed(path, allow_pickle=False, **demos)
    return demos


def read_history(checkpoint: Path) -> History:
    """Return the facts about every training of a checkpoint's weights, in their order."""
    with safe_open(checkpoint, "pt") as file:
        history: History = json.loads(file.metadata()["training"])
    return history
