"""Reads recorded observations: an .npz file with one array per input, a row for every observation, in their order.

Images are under their camera's name, (N, height, width, 3) uint8 in the spec's size; the state is `state`, (N, S); the
goal is `goal`, of as many rows: states (N, G, S), images, or instructions as strings.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from policy_models.spec import Observation, PolicySpec
from policy_server.errors import BundleInvalid


def read_observations(path: Path, spec: PolicySpec, *, seed: int = 0) -> Sequence[Observation]:
    """Return every observation of a file.

    Instructions that are not recorded are drawn from the spec's examples with `seed`; goals that may be left out are.

    Raises:
        BundleInvalid: The file is no .npz, lacks an input, or an array does not fit the spec.
    """
    arrays = dict(read_images(path, spec))
    recorded = _load(path, ("state", "goal"))
    if spec.state:
        arrays["state"] = _numbers(path, recorded, "state", (spec.state.width,))
    goals: Sequence[np.ndarray | str | None] | None = None
    if spec.goal.kind != "none" and "goal" in recorded:
        goals = _goals(path, recorded, spec)
    lengths = {name: len(array) for name, array in (arrays | ({} if goals is None else {"goal": goals})).items()}
    if not lengths or len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise BundleInvalid(f"{path}: every array must have a row for each observation, got {lengths or 'no array'}")
    count = next(iter(lengths.values()))
    if goals is None:
        goals = _goals_unrecorded(path, spec, count, seed)
    return [
        Observation(
            {c.name: arrays[c.name][row] for c in spec.cameras}, arrays["state"][row] if spec.state else None, g
        )
        for row, g in enumerate(goals)
    ]


def read_images(path: Path, spec: PolicySpec) -> Mapping[str, np.ndarray]:
    """Return the images of a file by camera, each (N, height, width, 3) uint8; raises BundleInvalid."""
    recorded = _load(path, [camera.name for camera in spec.cameras])
    if missing := [camera.name for camera in spec.cameras if camera.name not in recorded]:
        wanted = ", ".join(camera.name for camera in spec.cameras)
        raise BundleInvalid(f"{path} lacks {missing[0]!r}; it must hold an array for each of the cameras {wanted}")
    for camera in spec.cameras:
        _check_images(path, camera.name, recorded[camera.name], (camera.height, camera.width))
    return recorded


def _load(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names if name in arrays}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise BundleInvalid(f"{path} is no .npz file of observations: {error}") from error


def _goals(path: Path, recorded: Mapping[str, np.ndarray], spec: PolicySpec) -> Sequence[np.ndarray | str]:
    goals = recorded["goal"]
    if spec.goal.kind == "text":
        if goals.dtype.kind != "U" or goals.ndim != 1:
            raise BundleInvalid(f"{path}: 'goal' is {goals.dtype} {goals.shape}, expected instructions, one a row")
        return [str(goal) for goal in goals]
    if spec.goal.kind == "image":
        assert spec.goal.camera is not None, "the spec was checked when it was read"
        _check_images(path, "goal", goals, (spec.goal.camera.height, spec.goal.camera.width))
        return list(goals)
    assert spec.state is not None, "the spec was checked when it was read"
    return list(_numbers(path, recorded, "goal", (spec.goal.length, spec.state.width)))


def _goals_unrecorded(path: Path, spec: PolicySpec, count: int, seed: int) -> Sequence[np.ndarray | str | None]:
    if spec.goal.kind == "text" and spec.goal.examples:
        return [str(goal) for goal in np.random.default_rng(seed).choice(spec.goal.examples, count)]
    if spec.goal.kind == "none" or not spec.goal.required:
        return [None] * count
    raise BundleInvalid(f"{path} lacks 'goal', and this policy needs one with every observation")


def _numbers(path: Path, recorded: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = recorded.get(name)
    wanted = f"numbers (N, {', '.join(map(str, shape))})"
    if array is None:
        raise BundleInvalid(f"{path} lacks {name!r}, {wanted}")
    if array.dtype.kind not in "fiu" or array.shape[1:] != shape or not np.isfinite(array).all():
        raise BundleInvalid(f"{path}: {name!r} is {array.dtype} {array.shape}, expected finite {wanted}")
    return array.astype(np.float32)


def _check_images(path: Path, name: str, images: np.ndarray, size: tuple[int, int]) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != (*size, 3) or not len(images):
        raise BundleInvalid(
            f"{path}: {name!r} is {images.dtype} {images.shape}, expected uint8 (N, {size[0]}, {size[1]}, 3)"
        )
