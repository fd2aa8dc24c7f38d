"""A smooth drive along a route of cells, with the speed to drive it at."""

import math
from itertools import pairwise

import numpy as np

from policy_sim.grid import Cell, MazeGrid, Route

_SAMPLE_M = 0.05
_CURVE_POINTS = 32  # of one Bézier curve, before it is sampled anew at equal distances
_LATERAL_LIMIT_M_S2 = 7.0  # sets the speed in bends
_BRAKING_M_S2 = 4.0  # sets the speed before bends and before the goal
_ARRIVAL_GAIN_PER_S = 3.0  # speed per metre left, for the last stretch, where constant braking would be too stiff


class SmoothPath:
    """One quadratic Bézier curve through each cell of a route.

    A curve enters and leaves a cell at the middle of an edge and at right angles to it. So the path is smooth, and
    between the first gate and the last it keeps half a metre from every wall.
    """

    def __init__(
        self, grid: MazeGrid, route: Route, start: np.ndarray, goal: np.ndarray, *, top_speed_m_s: float
    ) -> None:
        """Lay the path.

        Args:
            grid: The maze.
            route: Cells from the one that holds `start` to the one that holds `goal`.
            start: (2,) metres.
            goal: (2,) metres.
            top_speed_m_s: Speed on straights.
        """
        curves = _bezier_curves([grid.centre_of(cell) for cell in route], start, goal)
        dense = np.concatenate([curve[:-1] for curve in curves] + [goal[None]])
        travelled_m = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(dense, axis=0).T))])
        self.length_m = float(travelled_m[-1])

        intervals = max(1, round(self.length_m / _SAMPLE_M))
        self._sample_m = max(self.length_m / intervals, 1e-9)  # start and goal may coincide
        samples_m = np.linspace(0.0, self.length_m, intervals + 1)
        points = np.stack([np.interp(samples_m, travelled_m, dense[:, axis]) for axis in (0, 1)], axis=1)
        tangents = np.gradient(points, axis=0)
        tangents /= np.maximum(np.hypot(*tangents.T), 1e-9)[:, None]
        speeds_m_s = _speed_profile(points, tangents, self._sample_m, top_speed_m_s)
        self._samples = np.column_stack([points, tangents, speeds_m_s])  # (P, 5): x, y, tangent x, tangent y, speed

        gates_m = travelled_m[:: _CURVE_POINTS - 1]
        bounds = [0, *np.searchsorted(samples_m, gates_m[1:-1]).tolist(), len(points)]
        self._span_of = {cell: slice(*span) for cell, span in zip(route, pairwise(bounds), strict=True)}
        self._span = self._span_of[route[0]]

    def enter(self, cell: Cell) -> bool:
        """Note which cell the ball is in; return False if the path does not pass through it."""
        if cell not in self._span_of:
            return False
        self._span = self._span_of[cell]
        return True

    def project(self, x_m: float, y_m: float) -> float:
        """Return how far along the path the point nearest to the ball lies, in metres.

        Only the stretch in the ball's own cell counts: a cell is convex, so the way there is clear of walls.
        """
        stretch = self._samples[self._span]
        dx_m, dy_m = x_m - stretch[:, 0], y_m - stretch[:, 1]
        nearest = int((dx_m * dx_m + dy_m * dy_m).argmin())
        _, _, tangent_x, tangent_y, _ = stretch[nearest].tolist()
        along_m = float(dx_m[nearest]) * tangent_x + float(dy_m[nearest]) * tangent_y
        return float((self._span.start + nearest) * self._sample_m + along_m)

    def at(self, travelled_m: float) -> tuple[float, float, float, float, float]:
        """Return (x m, y m, tangent x, tangent y, speed m/s) at a distance along the path, clipped to its ends."""
        place = min(max(travelled_m / self._sample_m, 0.0), len(self._samples) - 1.0)
        before = min(int(place), len(self._samples) - 2)
        first, second = self._samples[before : before + 2].tolist()
        weight = place - before
        x_m, y_m, tangent_x, tangent_y, speed_m_s = (a + weight * (b - a) for a, b in zip(first, second, strict=True))
        return x_m, y_m, tangent_x, tangent_y, speed_m_s


def _bezier_curves(centres: list[np.ndarray], start: np.ndarray, goal: np.ndarray) -> list[np.ndarray]:
    """Return one curve for each cell, (_CURVE_POINTS, 2) in metres each; each begins where the last one ended."""
    gates = [(before + after) / 2 for before, after in pairwise(centres)]
    controls = list(centres)
    if gates:
        controls[0] = _halfway(start, gates[0], 2 * (gates[0] - centres[0]))
        controls[-1] = _halfway(goal, gates[-1], 2 * (gates[-1] - centres[-1]))
    else:
        controls[0] = (start + goal) / 2
    t = np.linspace(0.0, 1.0, _CURVE_POINTS)[:, None]
    return [
        (1 - t) ** 2 * p0 + 2 * t * (1 - t) * p1 + t**2 * p2
        for (p0, p2), p1 in zip(pairwise([start, *gates, goal]), controls, strict=True)
    ]


def _halfway(point: np.ndarray, gate: np.ndarray, outwards: np.ndarray) -> np.ndarray:
    """Return the spot straight inside a gate, half as deep as `point`; bending at the centre could make a hook."""
    depth_m = float(np.dot(gate - point, outwards))
    return gate - outwards * depth_m / 2


def _speed_profile(points: np.ndarray, tangents: np.ndarray, sample_m: float, top_speed_m_s: float) -> np.ndarray:
    """Return the speed at each point, (P,) m/s: what the bend there allows, and what the points ahead allow."""
    curvatures_per_m = np.hypot(*np.gradient(tangents, axis=0).T) / sample_m
    bend_m_s = np.sqrt(_LATERAL_LIMIT_M_S2 / np.maximum(curvatures_per_m, 1e-9))
    left_m = sample_m * np.arange(len(points))[::-1]
    limits_m_s = np.minimum(np.minimum(bend_m_s, top_speed_m_s), _ARRIVAL_GAIN_PER_S * left_m).tolist()
    for i in reversed(range(len(limits_m_s) - 1)):
        limits_m_s[i] = min(limits_m_s[i], math.sqrt(limits_m_s[i + 1] ** 2 + 2 * _BRAKING_M_S2 * sample_m))
    return np.array(limits_m_s)
