"""The tensors of an upstream MoDE agent, from any of the files that they come in, under the agent's own names."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

logger = logging.getLogger(__name__)

# What a folder may hold: the released files' names first, then those of upstream's save_to_hf.py.
_FILES = ("model_cleaned.safetensors", "model_cleaned.pt", "model.safetensors", "model.pt")
# Other spellings: save_to_hf.py takes every "model." out of a key, pretraining calls the encoders by their cameras.
_SPELLINGS = {
    "inner_": "model.inner_model.",
    "img_encoder_image_primary.": "static_resnet.",
    "img_encoder_image_secondary.": "static_resnet.",
    "img_encoder_image_wrist.": "gripper_resnet.",
    "net.": "gripper_resnet.resnet.",
}
COUNTER = "num_batches_tracked"
_BUFFERS = ("running_mean", "running_var", COUNTER)
# Run where the file was made, it leaves out what only a class could read: configurations and optimizers.
_RESAVE = (
    "python -c \"import torch; c = torch.load({name!r}, map_location='cpu', weights_only=False); "
    "torch.save({{'state_dict': c['state_dict'], 'callbacks': {{k: {{'ema_weights': v['ema_weights']}} "
    "for k, v in c.get('callbacks', {{}}).items() if 'ema_weights' in v}}}}, {target!r})\""
)


class CheckpointMismatch(ValueError):
    """The file does not hold the weights of such a network; says which keys are missing, unexpected or misshapen."""


def find_file(path: Path) -> Path:
    """Return `path`, or the file of weights in it if it is a folder; raises CheckpointMismatch if it has none."""
    if not path.is_dir():
        return path
    for name in _FILES:
        if (path / name).exists():
            return path / name
    raise CheckpointMismatch(f"the folder {path} holds none of {', '.join(_FILES)}; name the file itself")


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Read tensors from a `.safetensors` file, or from any other if it holds plain tensors; no code in it is ever run.

    Files are mapped: a tensor is read when it is used. Of a training run's checkpoint, the moving averages are taken.

    Raises:
        CheckpointMismatch: It is neither, or its moving averages do not fit its weights.
        OSError: It cannot be read.
    """
    if file.suffix == ".safetensors":
        try:
            return _respelled(file.name, load_file(file))
        except SafetensorError as error:
            raise CheckpointMismatch(f"{file.name} could not be read as safetensors: {error}") from error
    try:
        raw = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # torch raises many types here, and each means the same to the user
        raise CheckpointMismatch(_unreadable(file, error)) from error
    tensors = raw["state_dict"] if isinstance(raw, Mapping) and "state_dict" in raw else raw
    if not isinstance(tensors, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise CheckpointMismatch(f"{file.name} holds no state dict of tensors")
    averages = _entry(raw, "callbacks", "EMA", "ema_weights")
    return _respelled(file.name, tensors if averages is None else _averaged(file.name, tensors, averages))


def _averaged(name: str, tensors: Mapping[str, Tensor], averages: Any) -> dict[str, Tensor]:
    """Put averages, a list without names, in the place of the weights they are averages of."""
    # Upstream's callback averages the values of the whole state dict; its evaluation names them as if it were the
    # parameters alone. Lengths tell which of the two a file holds.
    for keys in (list(tensors), [key for key in tensors if not key.endswith(_BUFFERS)]):
        if isinstance(averages, Sequence) and len(averages) == len(keys):
            break
    else:
        raise CheckpointMismatch(
            f"{name} holds {len(averages) if isinstance(averages, Sequence) else 'unreadable'} moving averages for "
            f"{len(tensors)} tensors, {len(keys)} of them parameters, so they cannot be told apart; save the "
            "checkpoint without 'callbacks' to import the weights themselves"
        )
    misfits = [
        key
        for key, average in zip(keys, averages, strict=True)
        if not isinstance(average, Tensor) or average.shape != tensors[key].shape
    ]
    if misfits:
        raise CheckpointMismatch(f"{name}: the moving averages do not fit the weights, first at {misfits[0]!r}")
    logger.info("%s: taking the moving averages of its weights", name)
    return {**tensors, **dict(zip(keys, averages, strict=True))}


def _respelled(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    respelled: dict[str, str] = {}
    for key in tensors:
        theirs = next((prefix for prefix in _SPELLINGS if key.startswith(prefix)), "")
        ours = _SPELLINGS.get(theirs, "") + key.removeprefix(theirs)
        if ours in respelled:
            raise CheckpointMismatch(f"{name} has {ours!r} twice, as {respelled[ours]!r} and as {key!r}")
        respelled[ours] = key
    return {ours: tensors[key] for ours, key in respelled.items()}


def _unreadable(file: Path, error: Exception) -> str:
    needed = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if needed is None:
        return f"{file.name} could not be read as plain tensors: {str(error).strip().splitlines()[0]}"
    return (
        f"{file.name} needs code to load ({needed[1]}), and such files are refused. If you trust it, save its tensors "
        "alone where that code is installed, and import the result: "
        + _RESAVE.format(name=file.name, target=f"{file.stem}-weights.pt")
    )


def _entry(raw: Any, *path: str) -> Any:
    for key in path:
        raw = raw.get(key) if isinstance(raw, Mapping) else None
    return raw
