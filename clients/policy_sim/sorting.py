"""A hand over a table that sorts things into two bins as it is told, before one camera."""

from types import TracebackType
from typing import Self

import numpy as np

from policy_sim.sorting_camera import SIZE_PX, SortingCamera
from policy_sim.sorting_scene import STEP_S, Scene, Task


class Sorting:
    """The table as a simulator: it is given a task, then actions.

    Attributes:
        scene: All there is to know of this moment. Robots see `render` and `state` instead.
    """

    STEP_S = STEP_S

    def __init__(self, task: Task, *, size_px: int = SIZE_PX) -> None:
        self.size_px = size_px
        self.scene = Scene.of(task)
        self._camera: SortingCamera | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def reset(self, task: Task) -> None:
        """Begin a task."""
        self.scene = Scene.of(task)

    def step(self, action: np.ndarray) -> bool:
        """Hold `action` for one control step and return whether the order is carried out after it.

        Args:
            action: (vx m/s, vy m/s, grip), (3,); see `Scene.after`.

        Raises:
            ValueError: `action` is not three finite numbers. Nothing has moved.
        """
        self.scene = self.scene.after(action)
        return self.scene.done

    def render(self) -> np.ndarray:
        """Return what the camera sees, (size_px, size_px, 3) uint8."""
        if self._camera is None:
            self._camera = SortingCamera(self.size_px)
        return self._camera.render(self.scene)

    def close(self) -> None:
        """Free the camera; the next `render` makes a new one."""
        if self._camera is not None:
            self._camera.close()
            self._camera = None
