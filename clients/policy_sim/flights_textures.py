"""Procedural textures of walls, floors and things; those of held-out spaces are of other kinds than training's."""

from collections.abc import Callable, Mapping

import numpy as np
from scipy import ndimage

SIZE_PX = 64


def draw_texture(rng: np.random.Generator, *, held_out: bool) -> np.ndarray:
    """Return a random texture, (64, 64, 3) uint8, that goes on without a seam on all sides."""
    kinds = HELD_OUT_TEXTURES if held_out else TEXTURES
    pattern = kinds[list(kinds)[rng.integers(len(kinds))]](rng)
    dark, light = rng.uniform(0.0, 1.0, size=(2, 3))
    image = dark + pattern[..., None] * (light - dark)
    grain = rng.normal(0.0, rng.uniform(0.0, 0.05), size=image.shape)
    return np.asarray(255 * np.clip(image + grain, 0.0, 1.0), dtype=np.uint8)


def _plain(rng: np.random.Generator) -> np.ndarray:
    return np.full((SIZE_PX, SIZE_PX), rng.random())


def _checks(rng: np.random.Generator) -> np.ndarray:
    x, y = _squares(int(2 ** rng.integers(1, 4)))
    return np.asarray((x + y) % 2.0)


def _stripes(rng: np.random.Generator) -> np.ndarray:
    x, y = _squares(int(2 ** rng.integers(1, 5)))
    return np.asarray((x if rng.integers(2) else y) % 2.0)


def _bricks(rng: np.random.Generator) -> np.ndarray:
    rows, joint = int(2 ** rng.integers(2, 4)), int(rng.integers(1, 3))
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX]
    tall = SIZE_PX // rows
    shifted = x + (y // tall % 2) * tall
    return np.asarray(((y % tall >= joint) & (shifted % (2 * tall) >= joint)).astype(float))


def _tiles(rng: np.random.Generator) -> np.ndarray:
    count = int(2 ** rng.integers(1, 4))
    tones = rng.random((count, count))
    wide = SIZE_PX // count
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX]
    return np.where((y % wide == 0) | (x % wide == 0), 0.0, tones[y // wide, x // wide])


def _clouds(rng: np.random.Generator) -> np.ndarray:
    noise = ndimage.gaussian_filter(rng.normal(size=(SIZE_PX, SIZE_PX)), rng.uniform(1.0, 6.0), mode="wrap")
    return _stretched(noise)


def _marble(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX] * 2 * np.pi / SIZE_PX
    bends = 3.0 * ndimage.gaussian_filter(rng.normal(size=x.shape), 6.0, mode="wrap") / 0.05
    return np.asarray(0.5 + 0.5 * np.sin(int(rng.integers(1, 5)) * x + int(rng.integers(1, 5)) * y + bends))


def _planks(rng: np.random.Generator) -> np.ndarray:
    boards = rng.random(int(2 ** rng.integers(2, 4)))
    along = ndimage.gaussian_filter(rng.normal(size=(SIZE_PX, SIZE_PX)), (0.7, 12.0), mode="wrap")
    tone = np.repeat(boards, SIZE_PX // len(boards))[:, None]
    return np.clip(0.6 * tone + 0.4 * _stretched(along), 0.0, 1.0)


def _speckles(rng: np.random.Generator) -> np.ndarray:
    dots = (rng.random((SIZE_PX, SIZE_PX)) < rng.uniform(0.01, 0.06)).astype(float)
    return np.asarray(np.minimum(1.0, 6.0 * ndimage.gaussian_filter(dots, rng.uniform(0.8, 2.0), mode="wrap")))


def _zigzag(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX]
    wide = int(2 ** rng.integers(3, 5))
    return np.asarray(((y + np.abs(x % (2 * wide) - wide)) // (wide // 2) % 2).astype(float))


TEXTURES: Mapping[str, Callable[[np.random.Generator], np.ndarray]] = {
    "plain": _plain,
    "checks": _checks,
    "stripes": _stripes,
    "bricks": _bricks,
    "tiles": _tiles,
    "clouds": _clouds,
}
HELD_OUT_TEXTURES: Mapping[str, Callable[[np.random.Generator], np.ndarray]] = {
    "marble": _marble,
    "planks": _planks,
    "speckles": _speckles,
    "zigzag": _zigzag,
}


def _squares(count: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX] * count // SIZE_PX
    return x, y


def _stretched(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return np.asarray((values - low) / (high - low))
