"""Pictures of MuJoCo scenes without a display."""

import atexit
import os
import sys
import weakref
from typing import Any

import mujoco
import numpy as np


class Offscreen:
    """A square picture buffer of its own GL context, for one model.

    MuJoCo renders with EGL on Linux, unless MUJOCO_GL names something else.
    """

    def __init__(self, model: Any, size_px: int) -> None:
        self.size_px = size_px
        model.vis.global_.offwidth = model.vis.global_.offheight = size_px
        gl = _gl_context(size_px)
        gl.make_current()
        self._gl = gl
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._finalizer = weakref.finalize(self, _free, gl, self._context)
        # MuJoCo shuts EGL down at exit, and registered that when EGL was imported; what comes later is called earlier.
        self._finalizer.atexit = False
        atexit.register(self._finalizer)
        self._rect = mujoco.MjrRect(0, 0, size_px, size_px)

    def render(self, scene: Any) -> np.ndarray:
        """Return the picture of an `MjvScene`, (size_px, size_px, 3) uint8."""
        self._gl.make_current()
        mujoco.mjr_render(self._rect, scene, self._context)
        image = np.empty((self.size_px, self.size_px, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(image, None, self._rect, self._context)
        return np.ascontiguousarray(image[::-1])  # GL's first row is the lowest

    def close(self) -> None:
        """Free what the GL library holds; the object cannot render afterwards."""
        self._finalizer()
        atexit.unregister(self._finalizer)


def _gl_context(size_px: int) -> Any:
    # MuJoCo takes a window system unless told otherwise before its import; a server has none, but EGL.
    if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
        from mujoco.egl import GLContext

        return GLContext(size_px, size_px)
    return mujoco.GLContext(size_px, size_px)


def _free(gl: Any, context: Any) -> None:
    gl.make_current()
    context.free()
    gl.free()
