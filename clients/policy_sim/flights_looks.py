"""How a space looks to a camera: textures, tints, lights, and how the camera is mounted; all that may be randomised."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Randomise = Literal["all", "textures", "none"]
RANDOMISE: tuple[Randomise, ...] = ("all", "textures", "none")

LIGHTS = 3
FOV_DEG = 90.0
_PLAIN_RGB = {
    "wall": (0.80, 0.79, 0.75),
    "lintel": (0.80, 0.79, 0.75),
    "floor": (0.45, 0.38, 0.32),
    "ceiling": (0.92, 0.92, 0.92),
}
_THING_RGB = (0.35, 0.45, 0.6)


@dataclass(frozen=True)
class Look:
    """Everything about a picture except what stands where.

    Attributes:
        materials: Which of the scene's textures each solid wears, (S,) int; -1 for none.
        tints: What that is multiplied by, or the colour of those without a texture, (S, 3) in 0..1.
        lights: Where each shines from, in parts of the space's size, (LIGHTS, 3) in 0..1.
        light_rgb: Their colours, (LIGHTS, 3); black for one that is off.
        ambient: Brightness of the light without a source.
        fov_deg: The camera's field of view.
        tilt_rad: How the camera is mounted: pitch (up) and roll.
        offset_m: How far the camera is from the middle of the robot: forward, left, up.
    """

    materials: np.ndarray
    tints: np.ndarray
    lights: np.ndarray
    light_rgb: np.ndarray
    ambient: float
    fov_deg: float = FOV_DEG
    tilt_rad: tuple[float, float] = (0.0, 0.0)
    offset_m: tuple[float, float, float] = (0.0, 0.0, 0.0)


def draw_look(rng: np.random.Generator, kinds: list[str], textures: int, randomise: Randomise) -> Look:
    """Return a random look.

    Args:
        rng: Decides it.
        kinds: Of the space's solids, floor and ceiling included.
        textures: How many the scene has.
        randomise: "all" draws everything anew, "textures" leaves lights and camera alone, "none" changes nothing.
    """
    lights = np.array([(0.3, 0.3, 0.9), (0.7, 0.7, 0.9), (0.5, 0.5, 0.9)])
    if randomise == "none":
        tints = np.array([_PLAIN_RGB.get(kind, _THING_RGB) for kind in kinds])
        return Look(np.full(len(kinds), -1), tints, lights, np.full((LIGHTS, 3), 0.25), 0.35)
    # What is of one kind mostly looks alike, as in a real house; a fifth does not.
    of_kind = {kind: int(rng.integers(textures)) for kind in dict.fromkeys(kinds)}
    odd = rng.random(len(kinds)) < 0.2
    materials = np.where(odd, rng.integers(textures, size=len(kinds)), [of_kind[kind] for kind in kinds])
    tints = rng.uniform(0.55, 1.0, size=(len(kinds), 3))
    if randomise == "textures":
        return Look(materials, tints, lights, np.full((LIGHTS, 3), 0.25), 0.35)
    on = np.maximum(rng.random((LIGHTS, 1)) < 0.7, np.eye(LIGHTS, 1))
    return Look(
        materials,
        tints,
        rng.uniform((0.0, 0.0, 0.4), (1.0, 1.0, 0.98), size=(LIGHTS, 3)),
        on * rng.uniform(0.1, 0.5) * rng.uniform(0.7, 1.0, size=(LIGHTS, 3)),
        float(rng.uniform(0.15, 0.5)),
        float(rng.uniform(FOV_DEG - 8, FOV_DEG + 8)),
        (float(rng.normal(0.0, 0.05)), float(rng.normal(0.0, 0.03))),
        (float(rng.uniform(0.0, 0.1)), float(rng.uniform(-0.05, 0.05)), float(rng.uniform(-0.08, 0.08))),
    )
