"""The two cameras that look at Meta-World's scenes: one beside the table, one on the wrist."""

from typing import Any

import mujoco
import numpy as np

from policy_sim.offscreen import Offscreen

CAMERAS = ("static", "wrist")

_STATIC_LOOKAT_M = (0.02, 0.68, 0.14)
_STATIC_DISTANCE_M = 0.95
_STATIC_AZIMUTH_DEG = 140.0  # from the robot's right: from its left the elbow hides the hand
_STATIC_ELEVATION_DEG = -38.0

# In the hand's frame: x points down, y away from the robot, z to its right. The fingers part along y.
_WRIST_EYE_M = (-0.05, -0.16, 0.08)
_WRIST_LOOKAT_M = (0.1, 0.06, 0.0)
_WRIST_FOVY_DEG = 80.0

_MAX_GEOMS = 2000


class Cameras:
    """Renders a model of Meta-World without what tells the task: markers of goals are left out.

    Shadows, reflections and anti-aliasing are off, which makes a picture four times as fast on a CPU.
    """

    def __init__(self, model: Any, size_px: int) -> None:
        self.size_px = size_px
        self._model = model
        _mount_wrist(model)
        model.vis.quality.offsamples = 0
        self._offscreen = Offscreen(model, size_px)
        self._scene = mujoco.MjvScene(model, _MAX_GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._option = mujoco.MjvOption()
        self._option.sitegroup[:] = 0  # goals are drawn as sites, and nothing else that matters is
        self._views = {"static": _static_view(), "wrist": _wrist_view(model)}

    def render(self, data: Any) -> dict[str, np.ndarray]:
        """Return what each camera sees, {name: (size_px, size_px, 3) uint8}."""
        mujoco.mj_camlight(self._model, data)  # else the wrist's camera stays where it was at the last physics step
        images = {}
        for name, view in self._views.items():
            mujoco.mjv_updateScene(
                self._model, data, self._option, None, view, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
            )
            images[name] = self._offscreen.render(self._scene)
        return images

    def close(self) -> None:
        """Free what the GL library holds; the object cannot render afterwards."""
        self._offscreen.close()


def _static_view() -> Any:
    view = mujoco.MjvCamera()
    view.type = mujoco.mjtCamera.mjCAMERA_FREE
    view.lookat[:] = _STATIC_LOOKAT_M
    view.distance = _STATIC_DISTANCE_M
    view.azimuth = _STATIC_AZIMUTH_DEG
    view.elevation = _STATIC_ELEVATION_DEG
    return view


def _wrist_view(model: Any) -> Any:
    view = mujoco.MjvCamera()
    view.type = mujoco.mjtCamera.mjCAMERA_FIXED
    view.fixedcamid = model.camera("gripperPOV").id
    return view


def _mount_wrist(model: Any) -> None:
    """Move Meta-World's `gripperPOV`, which sees a finger and the table, to where it sees what the hand does."""
    camera = model.camera("gripperPOV")
    eye, lookat, up = np.array(_WRIST_EYE_M), np.array(_WRIST_LOOKAT_M), np.array([-1.0, 0.0, 0.0])
    backward = (eye - lookat) / np.linalg.norm(eye - lookat)
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(backward, right), backward], axis=1)
    mujoco.mju_mat2Quat(camera.quat, rotation.ravel())
    camera.pos[:] = eye
    camera.fovy[:] = _WRIST_FOVY_DEG
    camera.mode[:] = mujoco.mjtCamLight.mjCAMLIGHT_FIXED.value
