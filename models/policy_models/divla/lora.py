"""A LoRA fine-tune (Hu et al. 2021): an adapter in peft's layout, and the weights that were trained without one."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from policy_models.divla.state_dict import (
    CheckpointMismatch,
    as_state_dict,
    listed,
    read_json,
    read_plain,
    read_safetensors,
    read_weights,
    respelled,
)

ADAPTER, SETTINGS, OTHERS = "adapter_model.safetensors", "adapter_config.json", "non_lora_trainables.bin"
_MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
# Settings of peft that change what an adapter means, and not its keys or shapes.
_UNSUPPORTED = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "fan_in_fan_out", "layer_replication")


def is_lora(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a whole policy."""
    return (folder / SETTINGS).exists()


def read_merged(folder: Path, base: Path | None) -> dict[str, Tensor]:
    """Read a LoRA fine-tune as a whole policy: W + alpha / r * B A in the place of every W that was adapted.

    Args:
        folder: With adapter, its settings and `non_lora_trainables.bin`.
        base: Folder of the policy or language model that was fine-tuned. None if `non_lora_trainables.bin` has all of
            its weights, as it does when upstream's training ends.

    Raises:
        CheckpointMismatch: A file or a key is missing or unknown, or a matrix has another shape than it should.
        OSError: A file cannot be read.
    """
    for name in (ADAPTER, OTHERS):
        if not (folder / name).exists():
            raise CheckpointMismatch(f"the folder {folder} has an adapter's settings, but no {name}")
    frozen, trained = _others(as_state_dict(OTHERS, read_plain(folder / OTHERS)))
    # Upstream loads the base, then what was trained; what it was frozen at is the same as the base, if there is one.
    tensors = {**frozen, **(read_weights(base) if base else {}), **trained}
    scale, rank = _scale(folder)
    for module, (A, B) in _matrices(read_safetensors(folder / ADAPTER)).items():
        key = f"{module}.weight"
        if key not in tensors:
            where = f"neither {base} nor {OTHERS}" if base else f"{OTHERS} without a base to fine-tune"
            raise CheckpointMismatch(f"{ADAPTER} adapts {key!r}, which is in {where}")
        W = tensors[key]
        if W.ndim != 2 or A.shape != (rank, W.shape[1]) or B.shape != (W.shape[0], rank):
            raise CheckpointMismatch(
                f"{ADAPTER}: {module!r} has matrices {tuple(A.shape)} and {tuple(B.shape)} of rank {rank} for a weight "
                f"{tuple(W.shape)}"
            )
        # Kept in float32: a small change of a bfloat16 weight would be rounded away.
        tensors[key] = W.float() + scale * (B.float() @ A.float())
    return tensors


def _others(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights under adapters, and all others, under upstream's names."""
    plain = {key.removeprefix("base_model."): tensor for key, tensor in tensors.items()}
    if any(key.startswith("model.policy_head.") for key in plain):
        plain = {key.removeprefix("model."): tensor for key, tensor in plain.items()}
    plain = respelled(OTHERS, {key: tensor for key, tensor in plain.items() if ".lora_" not in key})
    layer = ".base_layer."
    frozen = {key.replace(layer, "."): tensor for key, tensor in plain.items() if layer in key}
    return frozen, {key: tensor for key, tensor in plain.items() if layer not in key}


def _scale(folder: Path) -> tuple[float, int]:
    """Return alpha / r and r."""
    settings = read_json(folder / SETTINGS)
    changed = [name for name in _UNSUPPORTED if settings.get(name)]
    if changed or settings.get("peft_type") != "LORA":
        wrong = ", ".join(f"{name} = {settings.get(name)!r}" for name in (changed or ["peft_type"]))
        raise CheckpointMismatch(f"{SETTINGS}: only plain LoRA is supported, here {wrong}")
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), int | float) or settings[name] <= 0:
            raise CheckpointMismatch(f"{SETTINGS}: {name!r} is {settings.get(name)!r}, expected a number above 0")
    return settings["lora_alpha"] / settings["r"], int(settings["r"])


def _matrices(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B by the name of what they adapt."""
    plain = respelled(ADAPTER, {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()})
    matched = {key: _MATRIX.fullmatch(key) for key in plain}
    unknown = [key for key, match in matched.items() if match is None]
    if unknown:
        raise CheckpointMismatch(f"{ADAPTER} has unknown keys: {listed(unknown)}")
    found = {(match[1], match[2]): plain[key] for key, match in matched.items() if match}
    modules = dict.fromkeys(module for module, _ in found)
    alone = [f"{module}.lora_{side}" for module in modules for side in "AB" if (module, side) not in found]
    if alone:
        raise CheckpointMismatch(f"{ADAPTER} has no {listed(alone)}")
    return {module: (found[module, "A"], found[module, "B"]) for module in modules}
