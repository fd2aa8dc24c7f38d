"""How far it is to the nearest obstacle, everywhere in a space at once, and how far one can fly from there."""

import numpy as np
from scipy.ndimage import map_coordinates

from policy_sim.flights_space import ROBOT_RADIUS_M, Space

_VOXEL_M = 0.1
_FAR_M = 1.0  # distances beyond are not told apart; a sweep goes on from there
_TOUCH_M = 0.03
_SHORTEST_STEP_M = 0.04


class Field:
    """The clearance of a space on a lattice, between whose points it is interpolated.

    Where `Space.clearance` looks at every solid for every point, this looks a number up: simulations of many robots
    ask for millions. It errs by less than the lattice is wide, 0.1 m, and mostly by much less.
    """

    def __init__(self, space: Space) -> None:
        axes = [np.arange(0.0, size + _VOXEL_M, _VOXEL_M) for size in space.size_m]
        height = axes[2]
        self._clearance = np.empty([len(axis) for axis in axes], dtype=np.float32)
        self._clearance[:] = np.minimum(np.minimum(height, space.height_m - height), _FAR_M)
        for solid in space.solids:
            reach = solid.reach_m + _FAR_M
            spans = [
                slice(*np.searchsorted(axis, (middle - reach, middle + reach)))
                for axis, middle in zip(axes[:2], solid.centre[:2], strict=True)
            ]
            near = np.stack(np.meshgrid(axes[0][spans[0]], axes[1][spans[1]], height, indexing="ij"), axis=-1)
            part = self._clearance[spans[0], spans[1]]
            np.minimum(part, solid.distance(near), out=part)

    def clearance(self, points: np.ndarray) -> np.ndarray:
        """Return the distance of points, (..., 3), to what is nearest, at most 1 m, (...,) m."""
        places = np.moveaxis(points, -1, 0).reshape(3, -1) / _VOXEL_M
        found: np.ndarray = map_coordinates(self._clearance, places, order=1, mode="nearest", prefilter=False)
        return found.reshape(points.shape[:-1])

    def sweep(self, points: np.ndarray, directions: np.ndarray, limit_m: float) -> np.ndarray:
        """Return how far a robot gets before it touches something.

        Args:
            points: Where it starts, (N, 3) m.
            directions: Unit vectors that it may fly along, (N, D, 3).
            limit_m: Nobody looks further.

        Returns:
            (N, D) m, at most `limit_m`.
        """
        count, ways = directions.shape[:2]
        starts = np.repeat(points, ways, axis=0)
        headings = directions.reshape(-1, 3)
        flown = np.zeros(count * ways)
        going = np.arange(count * ways)
        while going.size:
            # Whatever is nearest is at least this far, in every direction: so far can be flown without a look.
            room = self.clearance(starts[going] + flown[going, None] * headings[going]) - ROBOT_RADIUS_M
            going, room = going[room > _TOUCH_M], room[room > _TOUCH_M]
            flown[going] = np.minimum(flown[going] + np.maximum(room, _SHORTEST_STEP_M), limit_m)
            going = going[flown[going] < limit_m]
        return flown.reshape(count, ways)
