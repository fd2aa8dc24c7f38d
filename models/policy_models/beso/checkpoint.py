"""Public BESO checkpoints, key by key.

`trained_models/*/{c,cfg}_beso_*/model_state_dict.pth` holds the EMA weights of a `GCDenoiser` as a plain state dict,
keys `inner_model.*`. It stores neither scaler nor configuration: those come from a statistics file and from the run's
`.hydra/config.yaml`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from policy_models.beso.config import BesoConfig
from policy_models.beso.network import make_denoiser

# What wrappers (Lightning, DataParallel, BESO's own CFG wrapper) put in front of `inner_model.`.
_PREFIXES = ("model.inner_model.", "module.inner_model.", "inner_model.", "")
_MASK = re.compile(r"blocks\.\d+\.attn\.mask$")


class CheckpointMismatch(ValueError):
    """The file does not hold the weights of such a network; says which keys are missing, unexpected or misshapen."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights under the keys of our denoiser, and the shape read from them."""

    config: BesoConfig
    weights: dict[str, Tensor]


def load_checkpoint(path: Path, *, heads: int, sigma_data: float = 0.5) -> Checkpoint:
    """Load a public checkpoint safely (no code in it is ever run).

    Args:
        path: A `.pth` state dict or a `.safetensors` file, keys plain or with any of the known prefixes.
        heads: Attention heads; no tensor's shape tells them.
        sigma_data: Of the preconditioning; 0.5 in every public run.

    Raises:
        CheckpointMismatch: Keys or shapes do not make a BESO network; the message lists them.
    """
    raw = _read(path)
    prefix = next((p for p in _PREFIXES if f"{p}tok_emb.weight" in raw), None)
    if prefix is None:
        found = ", ".join(list(raw)[:5])
        raise CheckpointMismatch(f"{path.name} holds no BESO network: no 'tok_emb.weight' among its keys {found}, ...")
    tensors = {key.removeprefix(prefix): value for key, value in raw.items() if key.startswith(prefix)}
    foreign = [key for key in raw if not key.startswith(prefix)]
    config = _read_config(tensors, heads=heads, sigma_data=sigma_data)
    # The mask buffer is the lower triangle; attention here is causal by construction.
    weights = {f"inner_model.{key}": value for key, value in tensors.items() if not _MASK.search(key)}
    expected = {key: value.shape for key, value in make_denoiser(config).state_dict().items()}
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys()) + foreign
    misshapen = [
        f"{key} {tuple(weights[key].shape)}, expected {tuple(shape)}"
        for key, shape in expected.items()
        if key in weights and weights[key].shape != shape
    ]
    if missing or unexpected or misshapen:
        raise CheckpointMismatch(
            f"{path.name} does not fit {config}:\n  missing: {_listed(missing)}\n  unexpected: {_listed(unexpected)}"
            f"\n  wrong shape: {_listed(misshapen)}"
        )
    return Checkpoint(config, {key: weights[key].float().contiguous() for key in expected})


def read_hydra_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve what serving needs from a run's `.hydra/config.yaml`, already parsed.

    Returns:
        heads, sigma_data, sigma_min, sigma_max, rho, sampler, steps, guidance, scaled, minmax.

    Raises:
        CheckpointMismatch: The file is not a BESO run's configuration; names the entry that is missing.
    """

    def entry(*path: str) -> Any:
        value: Any = config
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                raise CheckpointMismatch(f"the configuration has no entry {'.'.join(path)!r}")
            value = value[key]
        if isinstance(value, str) and (reference := re.fullmatch(r"\$\{([\w.]+)\}", value)):
            return entry(*reference[1].split("."))
        return value

    # Upstream's agents call two samplers by names of their own.
    renamed = {"ancestral": "dpm_2_ancestral", "dpm": "dpm_2", "dpmpp_2m_sde": "dpmpp_sde"}
    sampler = entry("agents", "sampler_type")
    return {
        "heads": int(entry("agents", "model", "inner_model", "n_heads")),
        "sigma_data": float(entry("agents", "model", "sigma_data")),
        "sigma_min": float(entry("agents", "sigma_min")),
        "sigma_max": float(entry("agents", "sigma_max")),
        "rho": float(entry("agents", "rho")),
        "sampler": renamed.get(sampler, sampler),
        "steps": int(entry("agents", "num_sampling_steps")),
        "guidance": float(entry("cond_lambda")),
        "scaled": bool(entry("scale_data")),
        "minmax": bool(config.get("workspaces", {}).get("use_minmax_scaler", False)),
    }


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here, and each means the same to the user
        raise CheckpointMismatch(
            f"{path.name} could not be read as a plain state dict ({error}). Files that need code to load are refused."
        ) from error
    if isinstance(raw, Mapping) and isinstance(raw.get("state_dict"), Mapping):
        raw = raw["state_dict"]
    if not isinstance(raw, Mapping) or not all(isinstance(value, Tensor) for value in raw.values()):
        raise CheckpointMismatch(f"{path.name} holds {type(raw).__name__}, expected a state dict of tensors")
    return dict(raw)


def _read_config(tensors: Mapping[str, Tensor], *, heads: int, sigma_data: float) -> BesoConfig:
    try:
        width, state_width = tensors["tok_emb.weight"].shape
        action_width = tensors["action_emb.weight"].shape[1]
        positions = tensors["pos_emb"].shape[1]  # G + T + 1
        sequence = tensors["blocks.0.attn.mask"].shape[-1]  # G + 2 T + 1
        layers = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
        hidden = "action_pred.2.weight" in tensors
        window = sequence - positions
        return BesoConfig(
            state_width=state_width,
            action_width=action_width,
            width=width,
            layers=layers,
            heads=heads,
            goal_length=positions - window - 1,
            window=window,
            hidden_output=tensors["action_pred.0.weight"].shape[0] if hidden else 0,
            sigma_data=sigma_data,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointMismatch(f"the shape of the network cannot be read from the keys: {error}") from error


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "nothing"
