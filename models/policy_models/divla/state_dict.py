"""The tensors of an upstream DiVLA policy, from any of the files that they come in, under upstream's own names."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LISTED = 8
# Transformers 5 calls the parts of a Qwen2-VL by other names than 4.46, which upstream was written for.
_SPELLINGS = {"model.visual.": "visual.", "model.language_model.": "model."}


class CheckpointMismatch(ValueError):
    """The files do not hold such a policy; says which keys or entries are missing, unexpected or wrong."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the safetensors of a folder, one file or several with an index.

    Files are mapped: a tensor is read when it is used, and they must stay where they are until then.

    Raises:
        CheckpointMismatch: The folder holds no such files, or they do not hold what the index says.
        OSError: One of them cannot be read.
    """
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise CheckpointMismatch(f"the folder {folder} holds neither {SINGLE} nor {INDEX}")
        return respelled(SINGLE, read_safetensors(folder / SINGLE))
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, Mapping) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointMismatch(f"{INDEX} has no entry 'weight_map' from keys to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not (folder / name).exists():
            raise CheckpointMismatch(f"{INDEX} names the file {name!r}, which is not in {folder}")
        shard = read_safetensors(folder / name)
        wanted = {key for key, where in shards.items() if where == name}
        if shard.keys() != wanted:
            raise CheckpointMismatch(
                f"{name} and {INDEX} disagree about the keys {listed(sorted(shard.keys() ^ wanted))}"
            )
        tensors |= shard
    return respelled(INDEX, tensors)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read one safetensors file; raises CheckpointMismatch if it is none, OSError if it cannot be read."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointMismatch(f"{file.name} could not be read as safetensors: {error}") from error


def read_plain(file: Path) -> Any:
    """Read what `torch.save` wrote, if it is plain containers of tensors; no code in it is ever run.

    Raises:
        CheckpointMismatch: It needs code to load, or is no such file.
        OSError: It cannot be read.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # torch raises many types here, and each means the same to the user
        reason = str(error).strip().splitlines()[0]
        raise CheckpointMismatch(
            f"{file.name} could not be read as plain tensors, and files that need code to load are refused: {reason}"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointMismatch if it is none, OSError if it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointMismatch(f"{file.name} could not be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointMismatch(f"{file.name} holds no JSON object")
    return content


def as_state_dict(name: str, raw: Any) -> dict[str, Tensor]:
    """Return `raw` if it is a state dict; raises CheckpointMismatch if it is not."""
    if not isinstance(raw, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in raw.items()):
        raise CheckpointMismatch(f"{name} holds no state dict of tensors")
    return dict(raw)


def respelled(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` under the names of transformers 4.46; raises CheckpointMismatch if two get the same."""
    upstream: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        theirs = next((prefix for prefix in _SPELLINGS if key.startswith(prefix)), "")
        spelled = _SPELLINGS.get(theirs, "") + key.removeprefix(theirs)
        if spelled in upstream:
            raise CheckpointMismatch(f"{name} has {spelled!r} twice, once as {key!r}")
        upstream[spelled] = tensor
    return upstream


def compare(name: str, got: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], hint: str) -> None:
    """Raise CheckpointMismatch, with `hint`, unless keys and shapes of `got` are those of `wanted`."""
    missing = sorted(wanted.keys() - got.keys())
    unexpected = sorted(got.keys() - wanted.keys())
    misshapen = [f"{k} {got[k]}, expected {wanted[k]}" for k in sorted(wanted) if k in got and got[k] != wanted[k]]
    if missing or unexpected or misshapen:
        raise CheckpointMismatch(
            f"{name} does not fit {hint}:\n  missing: {listed(missing)}\n  unexpected: {listed(unexpected)}"
            f"\n  wrong shape: {listed(misshapen)}"
        )


def listed(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "nothing") + more
