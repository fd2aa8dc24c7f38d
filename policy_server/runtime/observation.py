"""Checks what a robot sent against the policy's spec."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from policy_models.spec import CameraSpec, Observation, PolicySpec, VectorSpec
from policy_server.errors import MissingInput, NotFinite, ShapeMismatch, UnexpectedInput, UnusableGoal, WrongType
from policy_server.runtime.images import read_image

# How the field spells one input: openpi sends "observation/state" or {"images": {"top": ...}}, LeRobot sends
# "observation.images.top". Below these prefixes, a name means the same.
_PREFIXES = ("observation/", "images/")
# What the goal is called on the wire; openpi and LeRobot call an instruction a prompt or a task.
_GOAL_NAMES = {"none": None, "state": "goal", "image": "goal", "text": "prompt"}


def describe_inputs(spec: PolicySpec) -> dict[str, str]:
    """Return what an observation holds, by wire name, in words."""
    inputs = {camera.name: _picture(camera) for camera in spec.cameras}
    if spec.state:
        inputs["state"] = f"float32 ({spec.state.width},): {_listed(spec.state)}"
    goal = _GOAL_NAMES[spec.goal.kind]
    if goal:
        kinds = {
            "state": f"float32 ({spec.goal.length}, {spec.state.width if spec.state else 0}), a state to reach",
            "image": "what it should look like when done: " + (_picture(spec.goal.camera) if spec.goal.camera else ""),
            "text": f"an instruction of at most {spec.goal.longest} characters"
            + "".join(f", such as {e!r}" for e in spec.goal.examples[:1]),
        }
        inputs[goal] = kinds[spec.goal.kind] + ("" if spec.goal.required else "; may be left out")
    return inputs


class ObservationReader:
    """Turns wire observations into `Observation`s that fit one spec."""

    def __init__(self, spec: PolicySpec, *, ignore_unknown: bool = False) -> None:
        self.spec = spec
        self.ignore_unknown = ignore_unknown
        self.names = tuple(describe_inputs(spec))
        self._known = frozenset(self.names)
        self._cameras = {camera.name: camera for camera in spec.cameras}
        seen = spec.cameras if spec.goal.camera is None else (*spec.cameras, spec.goal.camera)
        self._sizes = frozenset((camera.height, camera.width) for camera in seen if camera.crop == 1)
        self._goal_name = _GOAL_NAMES[spec.goal.kind]
        # Refusals must call it what the robot does, whatever the bundle calls its camera.
        self._goal_camera = replace(spec.goal.camera, name=str(self._goal_name)) if spec.goal.camera else None

    def read(self, raw: Mapping[str, Any]) -> Observation:
        """Return the observation that `raw` holds.

        Args:
            raw: Inputs by name, flat or nested; arrays, lists of numbers, strings, or encoded image bytes.

        Raises:
            ObservationError: One of its subclasses names the input, what was got and what was wanted.
        """
        inputs = raw
        if raw.keys() != self._known:  # most robots send every input under its own name, nothing nested
            inputs = dict(self._named(raw))
            for name in self.names:
                if name not in inputs and (name != self._goal_name or self.spec.goal.required):
                    raise MissingInput(name, inputs)
        return Observation(
            images={name: read_image(camera, inputs[name]) for name, camera in self._cameras.items()},
            state=self._state("state", inputs["state"], rows=None) if self.spec.state else None,
            goal=self._goal(inputs) if self._goal_name else None,
        )

    def takes_long(self, raw: Mapping[str, Any]) -> bool:
        """Whether reading `raw` may take milliseconds, because images must be decoded, resized or transposed."""
        return any(
            isinstance(value, bytes)
            or (isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[:2] not in self._sizes)
            or (isinstance(value, dict) and self.takes_long(value))
            for value in raw.values()
        )

    def _named(self, raw: Mapping[str, Any]) -> list[tuple[str, Any]]:
        named: dict[str, Any] = {}
        for key, value in _flat(raw):
            name = key
            while name not in self.names and (prefix := next((p for p in _PREFIXES if name.startswith(p)), None)):
                name = name.removeprefix(prefix)
            if name not in self.names:
                # Every openpi client sends a prompt, also to policies that read none.
                if self.ignore_unknown or name == "prompt":
                    continue
                raise UnexpectedInput(key, self.names)
            if name in named:
                raise UnexpectedInput(f"{key} (a second {name!r})", self.names)
            named[name] = value
        return list(named.items())

    def _goal(self, inputs: Mapping[str, Any]) -> np.ndarray | str | None:
        name, kind = str(self._goal_name), self.spec.goal.kind
        value = inputs.get(name)
        if value is None:
            if self.spec.goal.required:
                raise MissingInput(name, (key for key in inputs if key != name))
            return None
        if kind == "state":
            return self._state(name, value, rows=self.spec.goal.length)
        if kind == "text":
            return self._instruction(name, value)
        assert self._goal_camera is not None, "the spec was checked when it was read"
        return read_image(self._goal_camera, value)

    def _instruction(self, name: str, value: Any) -> str:
        if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind == "U":
            value = value.item()  # openpi's own server takes a prompt in numpy's form too
        if not isinstance(value, str):
            raise WrongType(name, type(value).__name__, "an instruction")
        if len(value) > self.spec.goal.longest:
            raise UnusableGoal(
                f"{name!r} has {len(value)} characters, an instruction has at most {self.spec.goal.longest}"
            )
        if not value.strip():
            raise WrongType(name, repr(value), "an instruction")
        try:
            value.encode()  # JSON can spell half a letter, and no tokenizer takes it
        except UnicodeEncodeError as error:
            raise WrongType(name, f"text with half a letter, {value[error.start]!r}", "an instruction") from error
        return value

    def _state(self, name: str, value: Any, *, rows: int | None) -> np.ndarray:
        """Return (S,) float32 for `rows` None, else (rows, S)."""
        assert self.spec.state is not None
        width = self.spec.state.width
        wanted = (width,) if rows is None else (rows, width)
        if isinstance(value, list | tuple) and len(value) > max(width, rows or 0):
            raise ShapeMismatch(
                name,
                f"({len(value)},{' ...' if isinstance(value[0], list | tuple) else ''})",
                f"{wanted} ({', '.join(self.spec.state.names)})",
            )
        array = _numbers(name, value, longest=width)
        if rows == 1 and array.shape == (width,):
            array = array[None]
        if array.shape != wanted:
            raise ShapeMismatch(name, array.shape, f"{wanted} ({', '.join(self.spec.state.names)})")
        if array.dtype == np.float32:
            numbers = array
        else:
            with np.errstate(over="ignore"):
                numbers = array.astype(np.float32)
        finite = np.isfinite(numbers)
        if not finite.all():
            index = int(np.argmin(finite))
            raise NotFinite(name, index, float(np.ravel(array)[index]))
        return numbers


def _numbers(name: str, value: Any, *, longest: int) -> np.ndarray:
    if isinstance(value, list | tuple):
        # Looked through first: numpy would make room for the longest string in every place.
        leaves = [leaf for row in value for leaf in (row[: longest + 1] if isinstance(row, list | tuple) else (row,))]
        strays = [leaf for leaf in leaves if isinstance(leaf, bool) or not isinstance(leaf, int | float | np.number)]
        if strays:
            raise WrongType(name, f"a list with {type(strays[0]).__name__} in it", "an array of numbers")
        if any(isinstance(row, list | tuple) and len(row) > longest for row in value):
            raise WrongType(name, f"a list with rows longer than {longest}", "an array of numbers")
        try:
            value = np.array(value)
        except ValueError as error:
            raise WrongType(name, "a ragged list", "numbers") from error
    if not isinstance(value, np.ndarray):
        raise WrongType(name, type(value).__name__, "an array of numbers")
    if value.dtype.kind not in "fiu":
        raise WrongType(name, f"an array of {value.dtype}", "an array of numbers")
    return value


def _flat(raw: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in raw.items():
        if not isinstance(key, str):
            raise WrongType(f"{prefix}{key!r}", f"a key of type {type(key).__name__}", "a string")
        path = prefix + (key.replace(".", "/") if key.startswith("observation.") else key)
        items += _flat(value, f"{path}/") if isinstance(value, Mapping) else [(path, value)]
    return items


def _picture(camera: CameraSpec) -> str:
    size = f"({camera.height}, {camera.width}, 3)"
    if camera.resize == "refuse":
        return f"uint8 {size} RGB, raw or JPEG or PNG"
    part = f"its centre, {camera.crop:.0%} of each side," if camera.crop < 1 else "it"
    return f"uint8 RGB of any size, raw or JPEG or PNG; {part} is resized to {size}"


def _listed(vector: VectorSpec) -> str:
    return ", ".join(f"{name} [{unit}]" for name, unit in zip(vector.names, vector.units, strict=True))
