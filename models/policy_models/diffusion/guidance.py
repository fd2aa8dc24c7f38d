"""Classifier-free guidance at sampling time (Ho and Salimans 2022), on denoised outputs as BESO applies it.

lambda 0 asks for goal-free behaviour, 1 for conditional behaviour, and anything else mixes the two:
D = D_goal-free + lambda * (D_conditional - D_goal-free). Both come from one batch of two rows.
"""

import numpy as np


def guided_goals(goal: np.ndarray, guidance: float) -> np.ndarray:
    """Return the goals to denoise with, (rows, ...), for one goal, (...); an all-zero goal means goal-free."""
    if guidance == 1:
        return goal[None]
    if guidance == 0:
        return np.zeros_like(goal)[None]
    return np.stack((goal, np.zeros_like(goal)))


def combine(denoised: np.ndarray, guidance: float) -> np.ndarray:
    """Mix the rows that `guided_goals` asked for, (rows, H, A), into one, (1, H, A)."""
    if len(denoised) == 1:
        return denoised
    conditional, goal_free = denoised[:1], denoised[1:]
    return goal_free + guidance * (conditional - goal_free)


def shares(guidance: float) -> np.ndarray:
    """Return how much each row of `guided_goals` adds to what `combine` returns, (rows,)."""
    if guidance in (0, 1):
        return np.ones(1, dtype=np.float32)
    return np.array((guidance, 1 - guidance), dtype=np.float32)
