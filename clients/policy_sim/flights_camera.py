"""What a robot's front camera sees of a space, drawn by MuJoCo."""

import math
from collections.abc import Sequence

import mujoco
import numpy as np
from numpy.typing import ArrayLike

from policy_sim.flights_looks import LIGHTS, Look
from policy_sim.flights_space import Solid, Space
from policy_sim.flights_textures import SIZE_PX as TEXTURE_PX
from policy_sim.flights_textures import draw_texture
from policy_sim.offscreen import Offscreen

SIZE_PX = 64
TEXTURES = 24
_PLAIN = "plain"
_SIDES = 14  # of what is drawn for a cylinder
_THICK_M = 0.2


class FlightsCamera:
    """Draws one space on the CPU, with one set of textures; everything else of a look may change with every picture.

    Shadows, reflections and anti-aliasing are off: they cost most of the time, and the looks differ by more.
    """

    def __init__(self, space: Space, *, held_out: bool, seed: int, size_px: int = SIZE_PX) -> None:
        self.space, self.size_px = space, size_px
        solids = [*space.solids, *_shell(space)]
        self.kinds = [solid.kind for solid in solids]
        self._model = mujoco.MjModel.from_xml_string(_model_xml(solids))
        rng = np.random.default_rng([seed, 7])
        for i in range(TEXTURES):
            start = self._model.tex_adr[i]
            texture = draw_texture(rng, held_out=held_out).ravel()
            self._model.tex_data[start : start + texture.size] = texture
        self._model.mat_texrepeat[:TEXTURES] = rng.uniform(0.3, 1.5, size=(TEXTURES, 1))
        self._plain = self._model.material(_PLAIN).id
        self._data = mujoco.MjData(self._model)
        mujoco.mj_forward(self._model, self._data)
        self._offscreen = Offscreen(self._model, size_px)
        self._scene = mujoco.MjvScene(self._model, self._model.ngeom)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._option = mujoco.MjvOption()
        self._view = mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._view.fixedcamid = 0

    def render(self, position: np.ndarray, yaw_rad: float, look: Look) -> np.ndarray:
        """Return what a robot sees from a place, (size_px, size_px, 3) uint8.

        Args:
            position: The robot's middle (x, y, z), m.
            yaw_rad: Where it is headed, from the x axis to the left.
            look: Of this picture; drawn for `self.kinds` and `TEXTURES` textures.
        """
        self._dress(look)
        self._aim(position, yaw_rad, look)
        every = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, self._data, self._option, None, self._view, every, self._scene)
        return self._offscreen.render(self._scene)

    def close(self) -> None:
        """Free what the GL library holds; the object cannot render afterwards."""
        self._offscreen.close()

    def _dress(self, look: Look) -> None:
        self._model.geom_matid[:] = np.where(look.materials < 0, self._plain, look.materials)
        self._model.geom_rgba[:, :3] = look.tints
        self._model.light_diffuse[:] = look.light_rgb
        self._model.vis.headlight.ambient[:] = look.ambient
        self._data.light_xpos[:] = look.lights * self.space.size_m

    def _aim(self, position: np.ndarray, yaw_rad: float, look: Look) -> None:
        pitch, roll = look.tilt_rad
        turn = _about(2, yaw_rad) @ _about(1, -pitch) @ _about(0, roll)
        forward, left, up = turn.T
        self._data.cam_xpos[0] = position + _about(2, yaw_rad) @ look.offset_m
        self._data.cam_xmat[0] = np.stack([-left, up, -forward], axis=1).ravel()  # MuJoCo's looks along -z
        self._model.cam_fovy[0] = look.fov_deg


def _shell(space: Space) -> list[Solid]:
    x, y = (size / 2 for size in space.size_m[:2])
    below, above = -_THICK_M / 2, space.height_m + _THICK_M / 2
    return [Solid(kind, "box", (x, y, z), (x, y, _THICK_M / 2)) for kind, z in (("floor", below), ("ceiling", above))]


def _model_xml(solids: Sequence[Solid]) -> str:
    textures = "".join(
        f'<texture name="t{i}" type="2d" builtin="flat" width="{TEXTURE_PX}" height="{TEXTURE_PX}"/>'
        f'<material name="m{i}" texture="t{i}" specular="0" shininess="0"/>'
        for i in range(TEXTURES)
    )
    meshes = "".join(_mesh_xml(f"s{i}", solid) for i, solid in enumerate(solids))
    # A colour of its own from the start: MuJoCo tints a material only by what is not its default.
    geoms = "".join(f'<geom type="mesh" mesh="s{i}" rgba="1 1 1 1" material="{_PLAIN}"/>' for i in range(len(solids)))
    lights = '<light pos="0 0 0" dir="0 0 -1" cutoff="180" attenuation="1 0.03 0.01" specular="0 0 0"/>' * LIGHTS
    return f"""
    <mujoco>
      <compiler balanceinertia="true"/>
      <statistic center="0 0 0" extent="10"/>
      <visual>
        <map znear="0.003" zfar="6"/>
        <quality offsamples="0"/>
        <headlight ambient=".3 .3 .3" diffuse=".1 .1 .1" specular="0 0 0"/>
      </visual>
      <asset>{textures}<material name="{_PLAIN}" specular="0" shininess="0"/>{meshes}</asset>
      <worldbody><camera name="front" pos="0 0 0"/>{lights}{geoms}</worldbody>
    </mujoco>
    """


def _mesh_xml(name: str, solid: Solid) -> str:
    """A mesh rather than one of MuJoCo's own shapes: those stretch a texture over long walls."""
    corners, texels = _tube(solid) if solid.shape == "cylinder" else _box(solid)
    turn = _about(2, solid.yaw_rad)
    vertices = corners.reshape(-1, 3) @ turn.T + solid.centre
    first = 4 * np.arange(len(corners))[:, None]
    faces = np.concatenate([first + np.array(corner) for corner in ((0, 1, 2), (0, 2, 3))])
    return (
        f'<mesh name="{name}" inertia="shell" vertex="{_numbers(vertices)}" texcoord="{_numbers(texels)}" '
        f'face="{_numbers(faces)}"/>'
    )


def _box(solid: Solid) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of six faces, (6, 4, 3) m, anticlockwise from outside, and where in a texture they lie."""
    corners, texels = [], []
    half = np.asarray(solid.half)
    for axis in range(3):
        u, v = [(1, 2), (0, 2), (0, 1)][axis]
        for side in (-1.0, 1.0):
            # x goes with y to z, y with x to -z: the faces of y are the other way round.
            ring = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
            if (side > 0) == (axis == 1):
                ring = ring[::-1]
            face = np.zeros((4, 3))
            face[:, axis] = side * half[axis]
            face[:, u], face[:, v] = np.array(ring).T * half[[u, v], None]
            corners.append(face)
            texels.append(face[:, [u, v]])
    return np.array(corners), np.array(texels)


def _tube(solid: Solid) -> tuple[np.ndarray, np.ndarray]:
    """Return sides and ends of a cylinder in the same way, (F, 4, 3) and (F, 4, 2); the ends are fans."""
    radius, _, half = solid.half
    angles = np.linspace(0, 2 * np.pi, _SIDES + 1)
    rim = radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    corners, texels = [], []
    for i in range(_SIDES):
        (a, b), (low, high) = rim[i : i + 2], (-half, half)
        corners.append([(*a, low), (*b, low), (*b, high), (*a, high)])
        around = radius * angles[i : i + 2]
        texels.append([(around[0], low), (around[1], low), (around[1], high), (around[0], high)])
    for i in range(0, _SIDES, 2):
        a, b, c = rim[i : i + 3]
        for z, ring in ((half, ((0, 0), a, b, c)), (-half, ((0, 0), c, b, a))):
            corners.append([(*corner, z) for corner in ring])
            texels.append([tuple(corner) for corner in ring])
    return np.array(corners), np.array(texels)


def _about(axis: int, angle_rad: float) -> np.ndarray:
    cos, sin = math.cos(angle_rad), math.sin(angle_rad)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    turn = np.eye(3)
    turn[i, i] = turn[j, j] = cos
    turn[j, i], turn[i, j] = sin, -sin
    return turn


def _numbers(values: ArrayLike) -> str:
    return " ".join(f"{value:.6g}" for value in np.ravel(values))
