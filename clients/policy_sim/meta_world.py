"""Meta-World's robot arm before a drawer, a faucet or a window, for two tasks at once."""

import warnings
from types import TracebackType
from typing import Any, Self

import mujoco
import numpy as np
from metaworld import envs, policies

from policy_sim.meta_world_cameras import Cameras
from policy_sim.meta_world_tasks import SCENES, TASKS

STEP_S = 0.0125  # five physics steps, as in Meta-World
SIZE_PX = 96
ACTION_WIDTH = 4

_SCENE_STREAM = 4001  # set before the seed


class MetaWorld:
    """One scene, in which either of its two tasks can be done and both are judged.

    Physics, action and the tasks' success criteria are Meta-World's own. The environments of both tasks stand on one
    simulation, so that what is done is seen by both. An action is (dx, dy, dz, grip), (4,), clipped to [-1, 1]: the
    first three move the hand's target by up to 1 cm a step, the last one closes the fingers (1) or opens them (-1).

    MuJoCo renders with EGL on Linux, which needs no display.
    """

    STEP_S = STEP_S

    def __init__(self, scene: str, *, size_px: int = SIZE_PX) -> None:
        """Load a scene.

        Args:
            scene: A name in `SCENES`.
            size_px: Width and height of the images.

        Raises:
            KeyError: There is no scene of that name.
        """
        self.scene = SCENES[scene]
        self.size_px = size_px
        self._envs = {name: getattr(envs, TASKS[name].env)() for name in self.scene.tasks}
        self._experts = {name: getattr(policies, TASKS[name].expert)() for name in self.scene.tasks}
        # Both models come from the same file, so either environment may stand on the other's.
        self._env, other = self._envs.values()
        assert self._env.model_name == other.model_name, "the tasks of a scene share one model"
        other.model, other.data = self._env.model, self._env.data
        for env in self._envs.values():
            # What `env.set_task` does, without pickling the object's position into a task and out again.
            env._set_task_called = True
            env._freeze_rand_vec = True
        self._cameras: Cameras | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def state(self) -> np.ndarray:
        """Where the hand is: x, y, z in metres, then how far the fingers are apart, 0 to 1; (4,) float32."""
        return np.asarray(self._env._get_curr_obs_combined_no_goal()[:4], dtype=np.float32)

    @property
    def joint(self) -> float:
        """How far the scene's drawer, faucet or window has moved, in metres or radians."""
        return float(self._env.data.joint(self.scene.joint).qpos[0])

    def reset(self, seed: int) -> None:
        """Begin an episode: `seed` decides where object, joint and hand are, and knows nothing of the task."""
        rng = np.random.default_rng([_SCENE_STREAM, seed])
        object_pos = rng.uniform(*self.scene.object_start)
        hand_pos = rng.uniform(*self.scene.hand_start)
        joint = rng.uniform(*self.scene.joint_start)
        for env in reversed(self._envs.values()):  # the one that steps comes last, so that its hand is what stays
            env._last_rand_vec = object_pos
            env.hand_init_pos = hand_pos
            env.reset()
        data = self._env.data
        data.joint(self.scene.joint).qpos[:] = joint
        data.joint(self.scene.joint).qvel[:] = 0.0
        mujoco.mj_forward(self._env.model, data)

    def step(self, action: np.ndarray) -> frozenset[str]:
        """Hold `action` for one control step and return the tasks that are done in the state after it.

        Args:
            action: (dx, dy, dz, grip), (4,), clipped to [-1, 1].

        Raises:
            ValueError: `action` is not four finite numbers, or the episode is longer than Meta-World's 500 steps.
                Nothing has moved.
        """
        if np.shape(action) != (ACTION_WIDTH,) or not np.isfinite(action).all():
            raise ValueError(f"action is {action!r}, expected four finite numbers")
        clipped = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        self._env.step(clipped)
        return frozenset(name for name, env in self._envs.items() if _is_done(env, clipped))

    def expert_action(self, task: str) -> np.ndarray:
        """Return what Meta-World's scripted expert for `task` would do now, (4,) float32 in [-1, 1].

        The expert sees where hand and object are, which no policy is shown.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that its action is going to be clipped
            action: np.ndarray = self._experts[task].get_action(_observe(self._envs[task]))
        return action.clip(-1.0, 1.0).astype(np.float32)

    def render(self) -> dict[str, np.ndarray]:
        """Return what the cameras see, {"static", "wrist": (size_px, size_px, 3) uint8}."""
        if self._cameras is None:
            self._cameras = Cameras(self._env.model, self.size_px)
        return self._cameras.render(self._env.data)

    def close(self) -> None:
        """Free the cameras; the next `render` makes new ones."""
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None


def _observe(env: Any) -> np.ndarray:
    """Return the full state as the task's expert and its criterion read it, (39,)."""
    observation: np.ndarray = env._get_obs()
    space = env.sawyer_observation_space
    return observation.clip(space.low, space.high)


def _is_done(env: Any, action: np.ndarray) -> bool:
    _, facts = env.evaluate_state(_observe(env), action)
    return bool(facts["success"])
