"""What comes of flying in a direction: simulated flights that go on as a careful robot would, until they collide."""

import math
from dataclasses import dataclass

import numpy as np

from policy_sim.flights_directions import Directions, in_world
from policy_sim.flights_field import Field

# What a robot chooses from after the first step, in its own frame: fewer than its camera's, to be quick.
_CHOICES = Directions(rows=3, columns=7, fov_deg=(90.0, 40.0), reach_m=2.0)


@dataclass(frozen=True)
class Rollouts:
    """How flights are simulated.

    Attributes:
        first_m: How far the direction in question is flown before the robot chooses.
        step_m: How far each choice is flown.
        astray_rad: Standard deviation of what a robot flies beside its choice; nobody flies perfectly.
        discount: Of a collision for each metre that it is ahead.
        repeats: Flights for each direction.
    """

    first_m: float = 1.0
    step_m: float = 0.5
    astray_rad: float = 0.3
    discount: float = 0.85
    repeats: int = 2

    def collisions(
        self,
        field: Field,
        positions: np.ndarray,
        yaws_rad: np.ndarray,
        headings: np.ndarray,
        reach_m: float,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Return the discounted probability of a collision by Monte Carlo: a first direction is flown, then the freest.

        Args:
            field: Of the space.
            positions: Where robots are, (N, 3) m.
            yaws_rad: Where they are headed, (N,).
            headings: Unit vectors of the first direction, in the world, (N, K, 3).
            reach_m: How far each flight goes.
            rng: Decides how they go astray.

        Returns:
            (N, K), 0 for never and 1 for at once.
        """
        count, ways = headings.shape[:2]
        place = np.repeat(positions, ways * self.repeats, axis=0)
        heading = np.repeat(headings.reshape(-1, 3), self.repeats, axis=0)
        yaw = np.repeat(yaws_rad, ways * self.repeats)
        value = np.zeros(len(place))
        flown, going, length = 0.0, np.arange(len(place)), self.first_m
        while going.size and flown < reach_m:
            length = min(length, reach_m - flown)
            got = field.sweep(place[going], heading[going, None], length)[:, 0]
            hit = got < length - 1e-6
            value[going[hit]] = self.discount ** (flown + got[hit])
            going = going[~hit]
            place[going] += length * heading[going]
            flown, length = flown + length, self.step_m
            yaw[going] = _turned(yaw[going], heading[going])
            heading[going] = self._choose(field, place[going], yaw[going], rng)
        return np.asarray(value.reshape(count, ways, self.repeats).mean(axis=-1))

    def _choose(self, field: Field, places: np.ndarray, yaws_rad: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        options = in_world(_CHOICES.headings, yaws_rad)
        room = field.sweep(places, options, _CHOICES.reach_m)
        # Where several are as free, the one nearest to straight ahead.
        room = room + 0.1 * _CHOICES.headings.reshape(-1, 3)[:, 0]
        chosen = np.take_along_axis(options, room.argmax(axis=1)[:, None, None], axis=1)[:, 0]
        return _unit(chosen + rng.normal(0.0, self.astray_rad / math.sqrt(3), size=chosen.shape))


def _turned(yaws_rad: np.ndarray, headings: np.ndarray) -> np.ndarray:
    level = np.hypot(headings[:, 0], headings[:, 1])
    return np.where(level > 0.1, np.arctan2(headings[:, 1], headings[:, 0]), yaws_rad)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
