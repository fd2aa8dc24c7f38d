"""Indoor spaces to fly in: upright solids between a floor and a ceiling, and how far it is to the nearest of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Floor plans are drawn on a lattice of cells.
CELL_M = 0.5
# Of the sphere that is kept clear around a robot.
ROBOT_RADIUS_M = 0.2


@dataclass(frozen=True)
class Solid:
    """Something that stands, lies or hangs in a space.

    Attributes:
        kind: What it is, such as "wall" or "table"; decides how it looks.
        shape: An upright box, or an upright cylinder.
        centre: Its middle (x, y, z), m.
        half: Half its size (x, y, z) before it is turned, m; a cylinder's radius stands twice.
        yaw_rad: How far it is turned about the vertical.
    """

    kind: str
    shape: Literal["box", "cylinder"]
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    yaw_rad: float = 0.0

    @property
    def reach_m(self) -> float:
        """How far it reaches from its middle, seen from above."""
        return self.half[0] if self.shape == "cylinder" else math.hypot(*self.half[:2])

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Return the distance of points, (..., 3), to its surface, (...,) m; negative inside."""
        offset = points - np.asarray(self.centre)
        if self.shape == "cylinder":
            beyond = np.stack([np.hypot(offset[..., 0], offset[..., 1]), np.abs(offset[..., 2])], axis=-1)
            beyond = beyond - (self.half[0], self.half[2])
        else:
            cos, sin = math.cos(self.yaw_rad), math.sin(self.yaw_rad)
            x, y = offset[..., 0], offset[..., 1]
            turned = np.stack([cos * x + sin * y, cos * y - sin * x, offset[..., 2]], axis=-1)
            beyond = np.abs(turned) - self.half
        outside: np.ndarray = np.linalg.norm(np.maximum(beyond, 0.0), axis=-1)
        distance: np.ndarray = outside + np.minimum(beyond.max(axis=-1), 0.0)
        return distance


@dataclass(frozen=True)
class Space:
    """Solids on a floor at z = 0, under a ceiling.

    Attributes:
        solids: What is in the way, walls included; they close the space on every side.
        floor: Which cells of the plan are inside, (X, Y) bool; the first begins at the origin.
        height_m: Of the ceiling.
    """

    solids: Sequence[Solid]
    floor: np.ndarray
    height_m: float

    @property
    def size_m(self) -> tuple[float, float, float]:
        """How far it goes from the origin along x, y and z, walls included."""
        return (self.floor.shape[0] * CELL_M, self.floor.shape[1] * CELL_M, self.height_m)

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Return whether points, (..., 2 or more), are over the floor, seen from above, (...,)."""
        cells = np.floor(points[..., :2] / CELL_M).astype(np.intp)
        there = np.all((cells >= 0) & (cells < self.floor.shape), axis=-1)
        x, y = np.moveaxis(np.clip(cells, 0, np.array(self.floor.shape) - 1), -1, 0)
        return np.asarray(there & self.floor[x, y])

    def clearance(self, points: np.ndarray) -> np.ndarray:
        """Return the distance of points, (..., 3), to what is nearest of solids, floor and ceiling, (...,) m.

        It is exact outside solids and negative inside.
        """
        height = points[..., 2]
        nearest: np.ndarray = np.minimum(height, self.height_m - height)
        for solid in self.solids:
            nearest = np.minimum(nearest, solid.distance(points))
        return nearest
