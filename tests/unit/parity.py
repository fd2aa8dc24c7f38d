"""Reads the parity cases: what the public reference implementation answered."""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from policy_models.beso.config import BesoConfig

FOLDER = Path(__file__).parent.parent / "data" / "parity"


class ParityCase:
    """One case: configuration, weights without the mask buffers, and arrays by name."""

    def __init__(self, name: str) -> None:
        self.about = json.loads((FOLDER / f"{name}.json").read_text())
        with np.load(FOLDER / f"{name}.io.npz") as arrays:
            self.arrays = dict(arrays)
        file = FOLDER / f"{name}.weights.safetensors"
        self.all_weights = load_file(file) if file.exists() else self._drawn()
        self.weights = {k: v for k, v in self.all_weights.items() if not k.endswith(("mask", "num_batches_tracked"))}

    def config(self, **more: Any) -> BesoConfig:
        """The network's shape in our words."""
        inner = self.about["inner"]
        return BesoConfig(
            state_width=inner["state_dim"],
            action_width=inner["action_dim"],
            width=inner["embed_dim"],
            layers=inner["n_layers"],
            heads=inner["n_heads"],
            goal_length=inner["goal_seq_len"],
            window=inner["obs_seq_len"],
            hidden_output=0 if inner["linear_output"] else 100,
            **more,
        )

    def tensor(self, name: str) -> torch.Tensor:
        """One array as a tensor."""
        return torch.from_numpy(self.arrays[name])

    def assert_close(self, got: Any, name: str, *, atol: float = 2e-5) -> None:
        """The tolerance that holds in float32."""
        np.testing.assert_allclose(np.asarray(got), self.arrays[name], atol=atol, rtol=1e-4, err_msg=name)

    def _drawn(self) -> dict[str, torch.Tensor]:
        seed = self.about["seed"]
        return {key: torch.from_numpy(_draw(key, tuple(shape), seed)) for key, (shape, _) in self.about["keys"].items()}


@cache
def parity_case(name: str) -> ParityCase:
    """Read a case once."""
    return ParityCase(name)


def _draw(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Seeded weights, each from its own stream, as the reference's were."""
    n = _stream(key, seed).standard_normal(shape)
    if key.endswith("running_var"):
        value = 1 + 0.2 * np.abs(n)
    elif "pos_emb" in key:
        value = 0.5 * n
    elif len(shape) == 1:
        value = 1 + 0.1 * n if key.endswith(("weight", ".g")) else 0.1 * n
    else:
        gain = 0.3 if "film" in key or "adaLN" in key else 2.0 if "router" in key else 1.0
        value = gain * n / np.sqrt(float(np.prod(shape[1:])))
    return np.asarray(value, dtype=np.float32)


def drawn_input(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A seeded input, as the reference got it."""
    return torch.from_numpy(_stream(name, seed).standard_normal(shape).astype(np.float32))


def _stream(name: str, seed: int) -> np.random.RandomState:
    return np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
