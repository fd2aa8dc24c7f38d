"""Windows of play data with a goal found in hindsight: what one BESO training step sees.

Play is a long drive from goal to goal, (N episodes, L steps). A goal segment is a run of steps that pursue one goal.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policy_models.beso.config import BesoConfig
from policy_models.normalizer import Normalizer


@dataclass(frozen=True)
class Batch:
    """Normalised training windows."""

    states: Tensor  # (B, T, S)
    actions: Tensor  # (B, T - 1 + H, A): beside each state, then the future
    goal: Tensor  # (B, 1, S): a state that was reached later; all zeros where the goal was dropped


class PlayWindows:
    """Every window of play that one decision explains, ready to be drawn at random.

    A window is the step t of the newest observation: observations t-T+1 .. t and actions t-T+1 .. t+H-1. It lies in
    one goal segment: past a change of goal, the actions answer a question that nobody had asked at t. And nothing
    kicks the ball between t and the last action, since what follows a kick answers the kick. A kick before t may stay:
    its effect is in the observation.
    """

    def __init__(self, play: Mapping[str, np.ndarray], normalizer: Normalizer, config: BesoConfig) -> None:
        """Index the windows.

        Args:
            play: states (N, L, S), intended (N, L, A), goals (N, L, 2), kicked (N, L), in the robot's units.
            normalizer: Scales states and actions to the network's units.
            config: Gives T, H and the goal dimensions to leave open.
        """
        if config.goal_length != 1:
            raise ValueError(f"play data gives one goal state, got a goal length of {config.goal_length}")
        self.config = config
        # float32 from the start: what the network is shown here and on the robot is then the same to the last bit.
        self.states = torch.from_numpy(normalizer.normalize_state(play["states"])).flatten(0, 1)
        self.actions = torch.from_numpy(normalizer.normalize_action(play["intended"])).flatten(0, 1)
        self.last_of_segment = torch.from_numpy(_last_of_segment(play["goals"]))
        self.now = torch.from_numpy(_windows(play, self.last_of_segment.numpy(), config))

    def __len__(self) -> int:
        """How many windows there are."""
        return len(self.now)

    def draw(self, count: int, *, goal_dropout: float, generator: torch.Generator) -> Batch:
        """Draw `count` windows, and for each a goal: where the ball was at a random later step of the segment.

        Whole goals are dropped with probability `goal_dropout`, to learn goal-free behaviour in the same network.
        """
        now = self.now[torch.randint(len(self.now), (count,), generator=generator)]
        past = torch.arange(1 - self.config.window, 1)
        around = torch.arange(1 - self.config.window, self.config.horizon)

        steps_left = self.last_of_segment[now] - now
        later = now + 1 + (torch.rand(count, generator=generator) * steps_left).long()
        goal = self.states[later]
        goal[:, list(self.config.zeroed_goal_dims)] = 0
        goal[torch.rand(count, generator=generator) < goal_dropout] = 0
        return Batch(self.states[now[:, None] + past], self.actions[now[:, None] + around], goal[:, None])


def _last_of_segment(goals: np.ndarray) -> np.ndarray:
    """Return, for each of N * L steps, the index of the last step that pursues the same goal; (N * L,) int64."""
    ends = np.ones(goals.shape[:2], dtype=np.bool_)  # the last step of an episode ends a segment
    ends[:, :-1] = (goals[:, 1:] != goals[:, :-1]).any(axis=-1)
    lasts = np.flatnonzero(ends)
    return lasts[np.searchsorted(lasts, np.arange(ends.size))]


def _windows(play: Mapping[str, np.ndarray], last_of_segment: np.ndarray, config: BesoConfig) -> np.ndarray:
    """Return the steps t whose window is sound, (windows,) int64."""
    count = last_of_segment.size
    now = np.arange(config.window - 1, count - config.horizon)
    first, last = now - config.window + 1, now + config.horizon - 1
    in_one_segment = last_of_segment[first] == last_of_segment[last]
    has_future = now < last_of_segment[now]  # a later step to take the goal from
    kicks_before = np.concatenate(([0], np.cumsum(play["kicked"].ravel())))  # (N * L + 1,): kicks in steps 0 .. i-1
    undisturbed = kicks_before[last] == kicks_before[now]  # steps t .. t+H-2: the last action moves nothing in here
    return now[in_one_segment & has_future & undisturbed]
