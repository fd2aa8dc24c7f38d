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
        self.weights = {k: v for k, v in self.all_weights.items() if not k.endswith("mask")}

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

    def assert_close(self, got: Any, name: str) -> None:
        """The tolerance that holds in float32."""
        np.testing.assert_allclose(np.asarray(got), self.arrays[name], atol=2e-5, rtol=1e-4, err_msg=name)

    def _drawn(self) -> dict[str, torch.Tensor]:
        seed = self.about["seed"]
        return {key: torch.from_numpy(_draw(key, tuple(shape), seed)) for key, (shape, _) in self.about["keys"].items()}


@cache
def parity_case(name: str) -> ParityCase:
    """Read a case once."""
    return ParityCase(name)


def _draw(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Seeded weights, each from its own stream, as the reference's were."""
    n = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(shape)
    if "pos_emb" in key:
        value = 0.5 * n
    elif len(shape) == 1:
        value = 1 + 0.1 * n if key.endswith("weight") else 0.1 * n
    else:
        value = n / np.sqrt(np.prod(shape[1:]))
    return np.asarray(value, dtype=np.float32)
