"""Directions around a camera's view, as a grid: which way each bin of it leads, and which bin a velocity takes.

A robot that flies has its body frame: forward, left, up. Azimuth turns to the left, elevation up, both in rad.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# The numbers of an action that fly; one that turns as well has "yaw_rate", in rad/s to the left.
VELOCITY = ("forward", "left", "up")


@dataclass(frozen=True)
class CollisionSpec:
    """A grid of directions over one camera's view, each with the probability that flying there ends in a collision.

    Row 0 is the highest direction and column 0 the leftmost; bins lie at equal angles.

    Attributes:
        camera: Name of the camera.
        rows: Directions from the highest to the lowest.
        columns: Directions from the leftmost to the rightmost.
        fov_deg: From the leftmost direction to the rightmost, and from the highest to the lowest.
        reach_m: How far ahead a collision counts.
    """

    __pydantic_config__ = {"extra": "forbid"}

    camera: str
    rows: int
    columns: int
    fov_deg: tuple[float, float]
    reach_m: float

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 2 or not all(0 <= angle < 180 for angle in self.fov_deg):
            raise ValueError(
                f"a grid of directions needs a row, two columns and angles below 180 degrees, "
                f"got {self.rows}x{self.columns} over {self.fov_deg}"
            )
        if not self.reach_m > 0:
            raise ValueError(f"reach_m must be positive, got {self.reach_m}")

    @cached_property
    def azimuths_rad(self) -> np.ndarray:
        """Of the columns, (columns,): the leftmost first, and so the largest."""
        half = math.radians(self.fov_deg[0]) / 2
        return np.linspace(half, -half, self.columns)

    @cached_property
    def elevations_rad(self) -> np.ndarray:
        """Of the rows, (rows,): the highest first."""
        half = math.radians(self.fov_deg[1]) / 2 if self.rows > 1 else 0.0
        return np.linspace(half, -half, self.rows)

    @cached_property
    def headings(self) -> np.ndarray:
        """Unit vectors (forward, left, up), (rows, columns, 3)."""
        azimuth, elevation = np.meshgrid(self.azimuths_rad, self.elevations_rad)
        flat = np.cos(elevation)
        return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=-1)

    def bin_of(self, velocity: np.ndarray) -> tuple[int, int] | None:
        """Return (row, column) of the bin nearest to a velocity (forward, left, up), (3,); None if that leaves it.

        A velocity leaves the grid that points more than half a bin beyond the outermost directions, or is none at all.
        """
        speed = float(np.linalg.norm(velocity))
        if speed < 1e-6:
            return None
        azimuth, elevation = math.atan2(velocity[1], velocity[0]), math.asin(velocity[2] / speed)
        row, column = _nearest(self.elevations_rad, elevation), _nearest(self.azimuths_rad, azimuth)
        # A robot that flies level has one row, which stands for every elevation.
        return None if column is None or (row is None and self.rows > 1) else (row or 0, column)


def _nearest(angles: np.ndarray, angle: float) -> int | None:
    if len(angles) == 1:
        return 0
    step = abs(angles[1] - angles[0])
    place = int(np.argmin(np.abs(angles - angle)))
    return place if abs(angles[place] - angle) <= 0.5 * step + 1e-9 else None
