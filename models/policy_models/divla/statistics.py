"""The statistics of the data that a DiVLA policy was trained on, as upstream's training leaves them."""

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from policy_models.divla.state_dict import CheckpointMismatch, read_json
from policy_models.normalizer import Normalizer, Statistics

_NAME = "dataset_stats"
_WANTED = ("action_mean", "action_std", "action_min", "action_max", "qpos_mean", "qpos_std")
_UNUSED = "example_qpos"  # the states of one episode; upstream stores them and never reads them
_CONVERT = "python -c \"import numpy, pickle; numpy.savez('{name}.npz', **pickle.load(open('{name}.pkl', 'rb')))\""


def read_statistics(folder: Path) -> Normalizer:
    """Read `dataset_stats.json` or `dataset_stats.npz` from a checkpoint's folder or the one above.

    Returns:
        How states and actions are scaled: states by mean and deviation, actions from the widened range that upstream
        stores to [-1, 1], where its sampler clips them.

    Raises:
        CheckpointMismatch: There is none but upstream's pickle, or it lacks an entry, or its entries do not fit.
        OSError: It cannot be read.
    """
    places = (folder, folder.absolute().parent)
    for file in (place / f"{_NAME}{suffix}" for place in places for suffix in (".json", ".npz")):
        if file.exists():
            return _normalizer(file, read_json(file) if file.suffix == ".json" else _read_npz(file))
    pickled = [place / f"{_NAME}.pkl" for place in places if (place / f"{_NAME}.pkl").exists()]
    if pickled:
        raise CheckpointMismatch(
            f"{pickled[0]} is a pickle, which can run any code when it is opened, and is refused. If you trust it, "
            f"convert it where it lies: {_CONVERT.format(name=_NAME)}"
        )
    raise CheckpointMismatch(f"neither {places[0]} nor {places[1]} holds {_NAME}.json or {_NAME}.npz")


def _read_npz(file: Path) -> dict[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, BadZipFile) as error:
        raise CheckpointMismatch(f"{file.name} could not be read as plain arrays: {error}") from error


def _normalizer(file: Path, raw: dict[str, Any]) -> Normalizer:
    missing = [name for name in _WANTED if name not in raw]
    unknown = sorted(raw.keys() - {*_WANTED, _UNUSED})
    if missing or unknown:
        raise CheckpointMismatch(
            f"{file.name}: missing {', '.join(missing) or 'nothing'}, unknown {', '.join(unknown) or 'nothing'}"
        )
    values = {name: _vector(file, name, raw[name]) for name in _WANTED}
    for name in ("action_std", "qpos_std"):
        if min(values[name]) <= 0:
            raise CheckpointMismatch(f"{file.name}: {name!r} must be above 0, got {min(values[name])}")
    if any(low >= high for low, high in zip(values["action_min"], values["action_max"], strict=False)):
        raise CheckpointMismatch(f"{file.name}: every 'action_min' must be below its 'action_max'")
    mean, std = values["qpos_mean"], values["qpos_std"]
    try:
        # Upstream does not store the range of states, and nothing reads it: the mean stands in for it.
        state = Statistics(mean=mean, std=std, min=mean, max=mean)
        action = Statistics(*(values[f"action_{name}"] for name in ("mean", "std", "min", "max")))
    except ValueError as error:
        raise CheckpointMismatch(f"{file.name}: {error}") from error
    return Normalizer(state, action, "zscore", "minmax", clip=1.0)


def _vector(file: Path, name: str, raw: Any) -> tuple[float, ...]:
    try:
        vector = np.asarray(raw, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise CheckpointMismatch(f"{file.name}: {name!r} holds no numbers: {error}") from error
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise CheckpointMismatch(f"{file.name}: {name!r} must be a row of finite numbers, got shape {vector.shape}")
    return tuple(float(value) for value in vector)
