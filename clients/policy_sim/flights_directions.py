"""The directions that a robot may fly in, seen from its front: a grid over the camera's view.

It is laid out as `policy_models.directions.CollisionSpec` says: row 0 is the highest, column 0 the leftmost.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Directions:
    """Equal angles from the leftmost to the rightmost direction, and from the highest to the lowest.

    Attributes:
        rows: How many one above the other.
        columns: How many beside one another.
        fov_deg: From the first to the last of a row, and of a column.
        reach_m: How far ahead a collision counts.
    """

    rows: int = 5
    columns: int = 13
    fov_deg: tuple[float, float] = (90.0, 50.0)
    reach_m: float = 5.0

    @cached_property
    def headings(self) -> np.ndarray:
        """Unit vectors forward, left, up, (rows, columns, 3)."""
        across, high = (math.radians(angle) / 2 for angle in self.fov_deg)
        azimuth, elevation = np.meshgrid(
            np.linspace(across, -across, self.columns), np.linspace(high, -high, self.rows)
        )
        level = np.cos(elevation)
        return np.stack([level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation)], axis=-1)


class Grid(Protocol):
    """Directions over a robot's front, whoever laid them out."""

    @property
    def headings(self) -> np.ndarray:
        """Unit vectors forward, left, up, (rows, columns, 3)."""

    @property
    def reach_m(self) -> float:
        """How far ahead a collision counts."""


def in_world(headings: np.ndarray, yaws_rad: np.ndarray) -> np.ndarray:
    """Return directions in the frame of robots headed to some yaws as directions in the world.

    Args:
        headings: Unit vectors forward, left, up, (..., 3); D of them.
        yaws_rad: From the world's x axis to the left, (N,).

    Returns:
        (N, D, 3).
    """
    forward, left, up = headings.reshape(-1, 3).T
    cos, sin = np.cos(yaws_rad)[:, None], np.sin(yaws_rad)[:, None]
    height = np.broadcast_to(up, (len(yaws_rad), len(up)))
    return np.stack([cos * forward - sin * left, sin * forward + cos * left, height], axis=-1)
