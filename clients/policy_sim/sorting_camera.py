"""The sorting table's looks: MuJoCo draws every scene for one camera that looks down on the table."""

import math

import mujoco
import numpy as np
from numpy.typing import ArrayLike

from policy_sim.offscreen import Offscreen
from policy_sim.sorting_scene import BIN_HALF_M, BIN_X_M, MOST_THINGS, Scene
from policy_sim.sorting_words import COLOURS, KINDS

SIZE_PX = 112

_RGBA = dict(
    zip(
        COLOURS,
        ((0.85, 0.1, 0.1, 1.0), (0.1, 0.6, 0.15, 1.0), (0.12, 0.25, 0.85, 1.0), (0.95, 0.8, 0.05, 1.0)),
        strict=True,
    )
)
_BIN_RGBA = {"left": ".45 .47 .52 1", "right": "0.62 0.42 0.26 1"}
_HIDDEN_RGBA = (0.0, 0.0, 0.0, 0.0)

_GEOMS = {
    "cube": 'type="box" size=".05 .05 .05"',
    "ball": 'type="sphere" size=".056"',
    "ring": 'type="mesh" mesh="ring"',
    "bar": 'type="box" size=".085 .022 .03"',
}
_HEIGHTS_M = {"cube": 0.05, "ball": 0.056, "ring": 0.018, "bar": 0.03}  # of the middle, on the table
_RING_M, _RING_TUBE_M = 0.05, 0.018
_LIFT_M = 0.09

_HAND_GEOMS = {
    "finger-left": 'type="box" size=".01 .06 .02"',
    "finger-right": 'type="box" size=".01 .06 .02"',
    "bridge": 'type="box" size=".095 .012 .02"',
}
_HAND_RGBA = (0.1, 0.1, 0.1, 1.0)
_HAND_HEIGHT_M = 0.14
_BRIDGE_Y_M = 0.065
_OPEN_M, _CLOSED_M = 0.085, 0.065  # of a finger from the middle of the hand
_WALL_M = 0.008

_LIGHT = np.array([0.3, -0.2, -1.0])  # the way it goes
_SHADOW_RGBA = (0.0, 0.0, 0.0, 0.35)
_SHADOW_HEIGHT_M = 0.004  # above the floor of a bin
# What a solid's frame is multiplied by to become its shadow's. Some thickness stays: MuJoCo would not draw without.
_PRESS = np.array([[1.0, 0.0, -_LIGHT[0] / _LIGHT[2]], [0.0, 1.0, -_LIGHT[1] / _LIGHT[2]], [0.0, 0.0, 0.01]])

_FOVY_DEG = 30.0
_DISTANCE_M = 1.78
_ELEVATION_DEG = -72.0
_LOOKAT_M = (0.0, 0.0, 0.02)


class SortingCamera:
    """Draws scenes on the CPU.

    MuJoCo's own shadows, reflections and anti-aliasing are off: its shadows alone make a picture five times as slow.
    Each solid's shadow is a second, dark copy of it instead, pressed onto the table along the light.
    """

    def __init__(self, size_px: int = SIZE_PX) -> None:
        self.size_px = size_px
        self._model = mujoco.MjModel.from_xml_string(_model_xml())
        self._data = mujoco.MjData(self._model)
        mujoco.mj_forward(self._model, self._data)
        # MuJoCo turns a mesh to its principal axes; what it is turned by stands here.
        self._upright = self._data.geom_xmat.reshape(-1, 3, 3).copy()
        names = [*_HAND_GEOMS, *(f"{kind}{i}" for i in range(MOST_THINGS) for kind in KINDS)]
        self._ids = {name: (self._model.geom(name).id, self._model.geom(f"{name}-shadow").id) for name in names}
        self._offscreen = Offscreen(self._model, size_px)
        self._scene = mujoco.MjvScene(self._model, self._model.ngeom)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._option = mujoco.MjvOption()
        self._view = mujoco.MjvCamera()
        self._view.lookat[:] = _LOOKAT_M
        self._view.distance, self._view.azimuth, self._view.elevation = _DISTANCE_M, 90.0, _ELEVATION_DEG

    def render(self, scene: Scene) -> np.ndarray:
        """Return what the camera sees, (size_px, size_px, 3) uint8."""
        for i in range(MOST_THINGS):
            for kind in KINDS:
                self._place_thing(scene, i, kind)
        x_m, y_m = scene.hand
        apart_m = _CLOSED_M if scene.closed else _OPEN_M
        self._place("finger-left", (x_m - apart_m, y_m, _HAND_HEIGHT_M))
        self._place("finger-right", (x_m + apart_m, y_m, _HAND_HEIGHT_M))
        self._place("bridge", (x_m, y_m + _BRIDGE_Y_M, _HAND_HEIGHT_M))
        every = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, self._data, self._option, None, self._view, every, self._scene)
        return self._offscreen.render(self._scene)

    def close(self) -> None:
        """Free what the GL library holds; the object cannot render afterwards."""
        self._offscreen.close()

    def _place_thing(self, scene: Scene, i: int, kind: str) -> None:
        """Show the i-th thing if it is of this kind, and hide the geoms of this kind if it is not."""
        name = f"{kind}{i}"
        there = i < len(scene.places) and scene.task.things[i].kind == kind
        solid, shadow = self._ids[name]
        self._model.geom_rgba[solid] = _RGBA[scene.task.things[i].colour] if there else _HIDDEN_RGBA
        self._model.geom_rgba[shadow] = _SHADOW_RGBA if there else _HIDDEN_RGBA
        if there:
            height_m = _HEIGHTS_M[kind] + (_LIFT_M if i == scene.held else 0.0)
            self._place(name, (*scene.places[i], height_m), scene.task.yaws_rad[i])

    def _place(self, name: str, position: tuple[float, float, float], yaw_rad: float = 0.0) -> None:
        # Straight into what MuJoCo draws from: nothing here moves by its physics.
        solid, shadow = self._ids[name]
        turn = _about_z(yaw_rad) @ self._upright[solid]
        self._data.geom_xpos[solid] = position
        self._data.geom_xmat[solid] = turn.ravel()
        self._data.geom_xpos[shadow] = _PRESS @ position + (0.0, 0.0, _SHADOW_HEIGHT_M)
        self._data.geom_xmat[shadow] = (_PRESS @ turn).ravel()


def _about_z(yaw_rad: float) -> np.ndarray:
    c, s = math.cos(yaw_rad), math.sin(yaw_rad)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _model_xml() -> str:
    things = "".join(_solid_xml(f"{kind}{i}", _GEOMS[kind]) for i in range(MOST_THINGS) for kind in KINDS)
    hand = "".join(_solid_xml(name, geom) for name, geom in _HAND_GEOMS.items())
    bins = "".join(_bin_xml(bin_) for bin_ in BIN_X_M)
    vertices, faces = _torus()
    return f"""
    <mujoco>
      <statistic center="0 0 0" extent="0.7"/>
      <visual>
        <global fovy="{_FOVY_DEG}"/>
        <quality offsamples="0"/>
        <headlight ambient=".45 .45 .45" diffuse=".15 .15 .15" specular="0 0 0"/>
      </visual>
      <asset>
        <material name="matte" specular="0" shininess="0" rgba=".86 .84 .8 1"/>
        <mesh name="ring" vertex="{_numbers(vertices)}" face="{_numbers(faces)}"/>
      </asset>
      <worldbody>
        <light directional="true" dir="{_numbers(_LIGHT)}" diffuse=".5 .5 .5" specular=".3 .3 .3"/>
        <geom type="plane" size="1.5 1.5 .01" material="matte"/>
        {bins}
        {things}
        {hand}
      </worldbody>
    </mujoco>
    """


def _solid_xml(name: str, geom: str) -> str:
    return (
        f'<geom name="{name}" {geom} rgba="{_numbers(_HAND_RGBA)}"/>'
        f'<geom name="{name}-shadow" {geom} rgba="{_numbers(_SHADOW_RGBA)}"/>'
    )


def _bin_xml(bin_: str) -> str:
    x_m, (half_x_m, half_y_m), rgba = BIN_X_M[bin_], BIN_HALF_M, _BIN_RGBA[bin_]
    walls = "".join(
        f'<geom type="box" pos="{x} {y} .02" size="{size_x} {size_y} .02" rgba="{rgba}"/>'
        for x, y, size_x, size_y in (
            (x_m - half_x_m, 0.0, _WALL_M, half_y_m),
            (x_m + half_x_m, 0.0, _WALL_M, half_y_m),
            (x_m, -half_y_m, half_x_m, _WALL_M),
            (x_m, half_y_m, half_x_m, _WALL_M),
        )
    )
    return f'<geom type="plane" pos="{x_m} 0 .002" size="{half_x_m} {half_y_m} .01" rgba="{rgba}"/>{walls}'


def _torus(turns: int = 24, sides: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Return the ring's vertices, (V, 3) metres, and triangles, (F, 3), seen from outside."""
    u, v = np.meshgrid(np.arange(turns) * 2 * np.pi / turns, np.arange(sides) * 2 * np.pi / sides, indexing="ij")
    radius_m = _RING_M + _RING_TUBE_M * np.cos(v)
    vertices = np.stack([radius_m * np.cos(u), radius_m * np.sin(u), _RING_TUBE_M * np.sin(v)], axis=-1)
    i, j = np.meshgrid(np.arange(turns), np.arange(sides), indexing="ij")
    a, b = i * sides + j, (i + 1) % turns * sides + j
    c, d = (i + 1) % turns * sides + (j + 1) % sides, i * sides + (j + 1) % sides
    faces = np.concatenate([np.stack([a, b, c], axis=-1).reshape(-1, 3), np.stack([a, c, d], axis=-1).reshape(-1, 3)])
    return vertices.reshape(-1, 3), faces


def _numbers(values: ArrayLike) -> str:
    return " ".join(f"{value:g}" for value in np.ravel(values))
