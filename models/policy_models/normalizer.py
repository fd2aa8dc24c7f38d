"""Between the robot's units and the numbers a network was trained on.

A statistics file holds what was measured on the training data; public BESO checkpoints do not carry it. Scalings
follow BESO's `Scaler` and `MinMaxScaler`, quirks included, so that its checkpoints act as they did upstream.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

# BESO adds this to a standard deviation so that a constant dimension does not divide by zero.
_TINY = 1e-12


@dataclass(frozen=True)
class Statistics:
    """Per-dimension statistics of a vector over the training data; each has one entry per dimension."""

    __pydantic_config__ = {"extra": "forbid"}

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]

    def __post_init__(self) -> None:
        widths = {name: len(getattr(self, name)) for name in ("mean", "std", "min", "max")}
        if len(set(widths.values())) != 1:
            raise ValueError(f"statistics disagree about the width: {widths}")

    @classmethod
    def of(cls, data: np.ndarray) -> "Statistics":
        """Measure `data`, (..., width)."""
        rows = data.reshape(-1, data.shape[-1]).astype(np.float64)
        return cls(*(tuple(float(v) for v in f(axis=0)) for f in (rows.mean, rows.std, rows.min, rows.max)))


@dataclass(frozen=True)
class Normalizer:
    """Scales states in and actions out.

    Attributes:
        state: Statistics of the state.
        action: Statistics of the action, in the robot's units.
        state_scaling: "zscore" or "none".
        action_scaling: "zscore", "minmax" (to [-1, 1]) or "none".
        clip: Actions are clipped to their normalised bounds times this factor before they are un-normalised.
    """

    __pydantic_config__ = {"extra": "forbid"}

    state: Statistics
    action: Statistics
    state_scaling: Literal["zscore", "none"] = "zscore"
    action_scaling: Literal["zscore", "minmax", "none"] = "minmax"
    clip: float = field(default=1.1)

    def normalize_state(self, state: np.ndarray) -> np.ndarray:
        """Scale states, (..., S), to the network's units; float32."""
        if self.state_scaling == "none":
            return np.asarray(state, dtype=np.float32)
        mean, spread = self._state_affine
        return ((state - mean) / spread).astype(np.float32)

    def normalize_action(self, action: np.ndarray) -> np.ndarray:
        """Scale actions, (..., A), to the network's units; float32."""
        offset, scale = self._affine
        return ((action - offset) / scale).astype(np.float32)

    def denormalize_action(self, action: np.ndarray) -> np.ndarray:
        """Scale actions, (..., A), back to the robot's units; float32."""
        offset, scale = self._affine
        return (action * scale + offset).astype(np.float32)

    def clip_action(self, action: np.ndarray) -> np.ndarray:
        """Clip normalised actions, (..., A), to their bounds times `clip`; float32."""
        low, high = self._bounds
        return np.clip(action, low, high).astype(np.float32)

    def action_limits(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the lowest and highest action, in the robot's units, that `clip_action` lets through."""
        lower, upper = (self.denormalize_action(bound) for bound in self._bounds)
        return tuple(map(float, np.minimum(lower, upper))), tuple(map(float, np.maximum(lower, upper)))

    @cached_property
    def _state_affine(self) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.state.mean), np.asarray(self.state.std) + _TINY

    @cached_property
    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        mean, std, low, high = (np.asarray(getattr(self.action, k)) for k in ("mean", "std", "min", "max"))
        if self.action_scaling == "zscore":
            return mean, std + _TINY
        if self.action_scaling == "minmax":
            return (high + low) / 2, (high - low) / 2
        return np.zeros_like(mean), np.ones_like(mean)

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        offset, scale = self._affine
        # As upstream does it, the factor multiplies the bounds: one on the "wrong" side of zero gets tighter.
        return tuple((np.asarray(bound) - offset) / scale * self.clip for bound in (self.action.min, self.action.max))
