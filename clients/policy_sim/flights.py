"""A robot with a camera that flies about an indoor space until it collides."""

import math
from dataclasses import dataclass

import numpy as np

from policy_sim.flights_camera import SIZE_PX, TEXTURES, FlightsCamera
from policy_sim.flights_directions import Grid, in_world
from policy_sim.flights_field import Field
from policy_sim.flights_looks import Look, Randomise, draw_look
from policy_sim.flights_plans import make_space, places
from policy_sim.flights_space import ROBOT_RADIUS_M, Space

STEP_S = 0.1
TOP_SPEED_M_S, TOP_YAW_RATE_RAD_S = 1.0, 1.5
CAMERA = "front"
_START_CLEARANCE_M = 0.5
_SUBSTEPS = 4


@dataclass(frozen=True)
class Start:
    """Where a flight begins: middle of the robot (x, y, z) in m, and where it is headed."""

    position: np.ndarray
    yaw_rad: float


class Flights:
    """One flight in one space. Its look stays the same throughout, as that of a real house does.

    The robot takes a velocity in its own frame and a rate to turn to the left, and does at once what it is told, up to
    1 m/s and 1.5 rad/s.
    """

    def __init__(
        self, seed: int, *, held_out: bool = True, randomise: Randomise = "all", size_px: int = SIZE_PX
    ) -> None:
        rng = np.random.default_rng([seed, held_out, 11])
        self.space: Space = make_space(seed, held_out=held_out)
        self.field = Field(self.space)
        self._camera = FlightsCamera(self.space, held_out=held_out, seed=seed, size_px=size_px)
        self.look: Look = draw_look(rng, self._camera.kinds, TEXTURES, randomise)
        place = places(self.space, rng, 1, clearance_m=_START_CLEARANCE_M)[0]
        self.start = Start(place, self._freest(place))
        self.reset()

    def reset(self) -> None:
        """Begin again where this space's flight begins."""
        self.position, self.yaw_rad = self.start.position.copy(), self.start.yaw_rad
        self.flown_m, self.elapsed_s, self.collided = 0.0, 0.0, False
        self.path = [self.position.copy()]

    def image(self) -> np.ndarray:
        """Return what the front camera sees, (size_px, size_px, 3) uint8."""
        return self._camera.render(self.position, self.yaw_rad, self.look)

    def step(self, action: np.ndarray) -> bool:
        """Fly for 0.1 s, or up to a collision; returns whether there was one.

        Args:
            action: Velocity forward, left and up in m/s, and yaw rate to the left in rad/s, (4,).
        """
        velocity = np.asarray(action[:3], dtype=np.float64)
        velocity = velocity * min(1.0, TOP_SPEED_M_S / max(float(np.linalg.norm(velocity)), 1e-9))
        turn_rad = float(np.clip(action[3], -TOP_YAW_RATE_RAD_S, TOP_YAW_RATE_RAD_S)) * STEP_S
        for _ in range(_SUBSTEPS):
            cos, sin = math.cos(self.yaw_rad), math.sin(self.yaw_rad)
            forward, left, up = velocity * (STEP_S / _SUBSTEPS)
            ahead = self.position + np.array([cos * forward - sin * left, sin * forward + cos * left, up])
            self.elapsed_s += STEP_S / _SUBSTEPS
            self.yaw_rad += turn_rad / _SUBSTEPS
            if float(self.space.clearance(ahead)) < ROBOT_RADIUS_M:
                self.collided = True
                break
            self.flown_m += float(np.linalg.norm(ahead - self.position))
            self.position = ahead
        self.path.append(self.position.copy())
        return self.collided

    def room(self, grid: Grid) -> np.ndarray:
        """Return how far one gets in each direction from here, (rows, columns) m, at most `grid.reach_m`."""
        headings = in_world(grid.headings, np.array([self.yaw_rad]))
        return self.field.sweep(self.position[None], headings, grid.reach_m).reshape(grid.headings.shape[:2])

    def close(self) -> None:
        """Free what the camera holds."""
        self._camera.close()

    def _freest(self, place: np.ndarray) -> float:
        """Return the yaw that faces the most room, so that nobody starts in front of a wall."""
        yaws = np.linspace(-np.pi, np.pi, 24, endpoint=False)
        headings = np.stack([np.cos(yaws), np.sin(yaws), np.zeros_like(yaws)], axis=-1)
        return float(yaws[self.field.sweep(place[None], headings[None], 8.0)[0].argmax()])
