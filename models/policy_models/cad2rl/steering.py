"""From probabilities of collisions to a velocity: fly where a collision is least likely, and turn that way."""

import numpy as np

from policy_models.cad2rl.config import Steering
from policy_models.directions import CollisionSpec

# What a direction owes to its neighbours along each axis: a robot is wider than a ray.
_SMOOTHING = np.array([0.25, 0.5, 0.25])


def steer(collision: np.ndarray, directions: CollisionSpec, steering: Steering) -> np.ndarray:
    """Return the velocity (forward, left, up) in m/s with the yaw rate in rad/s, (4,) float32.

    It depends on this grid alone. Where nothing is free, the robot turns on the spot, always to the left: choosing a
    side anew each time, it could swing between two of them for ever.

    Args:
        collision: Probability of a collision in each direction, (rows, columns).
        directions: Which way each of them leads.
        steering: Speeds and thresholds.
    """
    smoothed = smooth(collision)
    row, column = np.unravel_index(np.argmin(smoothed + detour(directions, steering.straight)), smoothed.shape)
    likely = smoothed[row, column]
    if likely >= steering.blocked:
        return np.array([0.0, 0.0, 0.0, steering.turn_rad_s], dtype=np.float32)
    caution = np.clip((steering.blocked - likely) / (steering.blocked - steering.calm), 0.0, 1.0)
    velocity = steering.speed_m_s * caution * directions.headings[row, column]
    turn = np.clip(steering.turn_gain_hz * directions.azimuths_rad[column], -steering.turn_rad_s, steering.turn_rad_s)
    return np.append(velocity, turn).astype(np.float32)


def smooth(collision: np.ndarray) -> np.ndarray:
    """Return the mean of each direction with its neighbours, (rows, columns); edges are repeated outwards."""
    rows, columns = collision.shape
    padded = np.pad(collision, 1, mode="edge")
    down = sum(weight * padded[i : i + rows] for i, weight in enumerate(_SMOOTHING))
    return np.asarray(sum(weight * down[:, i : i + columns] for i, weight in enumerate(_SMOOTHING)))


def detour(directions: CollisionSpec, cost: float) -> np.ndarray:
    """Return what leaving the camera's axis costs, (rows, columns): `cost` at half of the wider field of view."""
    half = np.radians(max(directions.fov_deg)) / 2
    squares = directions.elevations_rad[:, None] ** 2 + directions.azimuths_rad**2
    return np.asarray(cost * squares / half**2)


def limits(steering: Steering) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the lowest and the highest numbers that `steer` can give."""
    high = (*(steering.speed_m_s,) * 3, steering.turn_rad_s)
    return (0.0, *(-value for value in high[1:])), high
