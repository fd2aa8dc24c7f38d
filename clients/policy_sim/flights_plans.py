"""Procedural floor plans: corridors, rooms with doors, furniture, pillars and people, all from a seed.

A plan is drawn on a lattice of half metres, where it is free or not; walls stand where free meets not free. Then things
are put into it, each only if every part of it can still be reached. The layouts and things of held-out spaces are
others than those of training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from policy_sim.flights_space import CELL_M, ROBOT_RADIUS_M, Solid, Space

_CELLS = (44, 44)
FLIGHT_HEIGHT_M = 1.3  # at which it is checked what can be reached
_HEIGHTS_M = (2.4, 3.0)
_DOOR_CELLS, _DOOR_HEIGHT_M = 2, 2.1
_PASSAGE_M = ROBOT_RADIUS_M + 0.15
_LOOK_M = 0.25  # lattice on which it is checked what can be reached
_REACHED = 0.94  # of what was free before a thing was put there
_THINGS_PER_M2 = 0.09


@dataclass(frozen=True)
class Thing:
    """A kind of thing to put into a space.

    Attributes:
        shape: Box or cylinder.
        half_x_m: Least and most of half its length, or of its radius.
        half_y_m: Least and most of half its width.
        height_m: Least and most; None for what reaches from floor to ceiling.
        hangs: From the ceiling.
    """

    shape: Literal["box", "cylinder"]
    half_x_m: tuple[float, float]
    half_y_m: tuple[float, float]
    height_m: tuple[float, float] | None
    hangs: bool = False


_SQUARE = (0.0, 0.0)
THINGS: Mapping[str, Thing] = {
    "person": Thing("cylinder", (0.2, 0.3), _SQUARE, (1.5, 1.9)),
    "pillar": Thing("cylinder", (0.12, 0.3), _SQUARE, None),
    "table": Thing("box", (0.4, 0.9), (0.3, 0.5), (0.7, 0.8)),
    "cupboard": Thing("box", (0.3, 0.7), (0.2, 0.3), (1.6, 2.2)),
    "crate": Thing("box", (0.2, 0.5), (0.2, 0.5), (0.4, 1.2)),
    "lamp": Thing("box", (0.1, 0.4), (0.1, 0.2), (0.3, 0.7), hangs=True),
}
HELD_OUT_THINGS: Mapping[str, Thing] = {
    "person": THINGS["person"],
    "post": Thing("box", (0.1, 0.25), (0.1, 0.25), None),
    "counter": Thing("box", (0.5, 1.2), (0.25, 0.35), (0.95, 1.15)),
    "barrel": Thing("cylinder", (0.25, 0.4), _SQUARE, (0.7, 1.4)),
    "screen": Thing("box", (0.5, 0.9), (0.03, 0.06), (1.5, 1.9)),
    "sign": Thing("box", (0.3, 0.5), (0.03, 0.06), (0.3, 0.6), hangs=True),
}


def make_space(seed: int, *, held_out: bool) -> Space:
    """Return the space of a seed; the same seed gives another one held out."""
    rng = np.random.default_rng([seed, held_out])
    layouts = HELD_OUT_LAYOUTS if held_out else LAYOUTS
    free, doors = layouts[list(layouts)[rng.integers(len(layouts))]](rng)
    free, doors = _cropped(free | doors, doors)
    height_m = float(rng.uniform(*_HEIGHTS_M))
    space = Space(_walls(free, doors, height_m), free, height_m)
    return _furnish(rng, space, HELD_OUT_THINGS if held_out else THINGS)


# Draws a plan: which cells are free, and which of them are doors.
Layout = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


def _branching(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Corridors that branch off one another at right angles, and end in rooms or nowhere."""
    free, along_x = np.zeros(_CELLS, dtype=bool), bool(rng.integers(2))
    corridor = _corridor(rng, _CELLS[0] // 2, along_x)
    free[corridor] = True
    for _ in range(int(rng.integers(3, 6))):
        along_x = not along_x
        free[_corridor(rng, int(rng.integers(6, 38)), along_x)] = True
    kept, _ = ndimage.label(free)
    return kept == kept[corridor].flat[0], np.zeros(_CELLS, dtype=bool)


def _rooms(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A corridor with rooms on both sides, each behind a door."""
    free, doors = np.zeros((2, *_CELLS), dtype=bool)
    middle, width = int(rng.integers(18, 24)), int(rng.integers(3, 6))
    free[2:42, middle : middle + width] = True
    for low, high in ((2, middle - 1), (middle + width + 1, 42)):
        start = 2
        while (end := start + int(rng.integers(7, 14))) <= 42:
            free[start:end, low:high] = True
            at = int(rng.integers(start, end - _DOOR_CELLS + 1))
            gap = middle - 1 if high < middle else middle + width
            doors[at : at + _DOOR_CELLS, gap] = True
            start = end + 1
    return free, doors


def _ring(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A corridor that runs around a block, with alcoves on its outside."""
    free = np.zeros(_CELLS, dtype=bool)
    width = int(rng.integers(3, 6))
    (left, low), (right, high) = rng.integers(6, 11, size=2), rng.integers(32, 38, size=2)
    free[left:right, low:high] = True
    free[left + width : right - width, low + width : high - width] = False
    for _ in range(int(rng.integers(3, 7))):
        at, deep, wide = (int(n) for n in rng.integers((12, 2, 3), (28, 5, 7)))
        side = int(rng.integers(4))
        spans = (
            (slice(at, at + wide), slice(low - deep, low))
            if side < 2
            else (slice(left - deep, left), slice(at, at + wide))
        )
        free[spans] = True
    if rng.integers(2):
        across = int(rng.integers(left + 8, right - 8))
        free[across : across + 3, low:high] = True
    return free, np.zeros(_CELLS, dtype=bool)


def _hall(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A large hall with partitions that stand out from its sides."""
    free = np.zeros(_CELLS, dtype=bool)
    length, width = (int(n) for n in rng.integers((30, 14), (41, 24)))
    free[2 : 2 + length, 2 : 2 + width] = True
    at = 2 + int(rng.integers(5, 8))
    side = bool(rng.integers(2))
    while at < length - 3:
        long = int(rng.integers(width // 3, 2 * width // 3 + 1))
        free[at, (slice(2, 2 + long) if side else slice(2 + width - long, 2 + width))] = False
        side, at = not side, at + int(rng.integers(5, 9))
    return free, np.zeros(_CELLS, dtype=bool)


LAYOUTS: Mapping[str, Layout] = {"branching": _branching, "rooms": _rooms}
HELD_OUT_LAYOUTS: Mapping[str, Layout] = {"ring": _ring, "hall": _hall}


def _corridor(rng: np.random.Generator, middle: int, along_x: bool) -> tuple[slice, slice]:
    width, start, end = (int(n) for n in rng.integers((3, 2, 28), (6, 16, 43)))
    low = min(middle, _CELLS[1] - 3 - width)
    spans = (slice(start, end), slice(low, low + width))
    return spans if along_x else (spans[1], spans[0])


def _cropped(free: np.ndarray, doors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut both to what is free and one cell around it."""
    spans = tuple(slice(cells.min(), cells.max() + 1) for cells in np.nonzero(free))
    return np.pad(free[spans], 1), np.pad(doors[spans], 1)


def _walls(free: np.ndarray, doors: np.ndarray, height_m: float) -> list[Solid]:
    wall = ndimage.binary_dilation(free, np.ones((3, 3), dtype=bool)) & ~free
    solids = [_block("wall", spans, 0.0, height_m) for spans in _rectangles(wall)]
    return solids + [_block("lintel", spans, _DOOR_HEIGHT_M, height_m) for spans in _rectangles(doors)]


def _rectangles(cells: np.ndarray) -> list[tuple[slice, slice]]:
    """Cover cells, (X, Y) bool, with rectangles that do not overlap."""
    left, found = cells.copy(), []
    for x, y in np.argwhere(cells):
        if left[x, y]:
            along_y = y + _run(np.asarray(left[x, y:]))
            along_x = x + _run(np.all(left[x:, y:along_y], axis=1))
            if along_y - y == 1:
                along_x = x + _run(left[x:, y])
            spans = (slice(x, along_x), slice(y, along_y))
            left[spans] = False
            found.append(spans)
    return found


def _run(cells: np.ndarray) -> int:
    """Return how many cells are set before the first that is not."""
    return len(cells) if cells.all() else int(np.argmin(cells))


def _block(kind: str, spans: tuple[slice, slice], low_m: float, high_m: float) -> Solid:
    (x0, x1), (y0, y1) = ((span.start * CELL_M, span.stop * CELL_M) for span in spans)
    centre = ((x0 + x1) / 2, (y0 + y1) / 2, (low_m + high_m) / 2)
    return Solid(kind, "box", centre, ((x1 - x0) / 2, (y1 - y0) / 2, (high_m - low_m) / 2))


def _furnish(rng: np.random.Generator, space: Space, things: Mapping[str, Thing]) -> Space:
    """Put things into a space until there are enough; one that shuts something off is taken out again."""
    cells = np.argwhere(space.floor)
    solids, open_m2 = list(space.solids), len(cells) * CELL_M**2
    lattice = _lattice(space)
    clear = _clear(space, lattice)
    wanted = round(open_m2 * _THINGS_PER_M2 * rng.uniform(0.6, 1.4))
    for _ in range(wanted):
        kind = list(things)[rng.integers(len(things))]
        at = (cells[rng.integers(len(cells))] + rng.random(2)) * CELL_M
        solid = _place(rng, kind, things[kind], at, space.height_m)
        after = np.minimum(clear, solid.distance(lattice))
        if _largest(after) >= _REACHED * _largest(clear):
            solids.append(solid)
            clear = after
    return Space(tuple(solids), space.floor, space.height_m)


def _place(rng: np.random.Generator, kind: str, thing: Thing, at: np.ndarray, ceiling_m: float) -> Solid:
    half_x = float(rng.uniform(*thing.half_x_m))
    half_y = half_x if thing.shape == "cylinder" else float(rng.uniform(*thing.half_y_m))
    height = ceiling_m if thing.height_m is None else float(rng.uniform(*thing.height_m))
    middle = ceiling_m - height / 2 if thing.hangs else height / 2
    yaw_rad = float(rng.choice([0.0, np.pi / 2]) + rng.normal(0.0, 0.15))
    return Solid(kind, thing.shape, (float(at[0]), float(at[1]), middle), (half_x, half_y, height / 2), yaw_rad)


def _lattice(space: Space) -> np.ndarray:
    x, y = (np.arange(_LOOK_M / 2, size, _LOOK_M) for size in space.size_m[:2])
    return np.stack(np.meshgrid(x, y, [FLIGHT_HEIGHT_M], indexing="ij"), axis=-1)


def _clear(space: Space, lattice: np.ndarray) -> np.ndarray:
    """Return the clearance on a lattice, which nothing has that is not inside."""
    return np.where(space.inside(lattice), space.clearance(lattice), -1.0)


def _largest(clear: np.ndarray) -> int:
    """Return how large the largest part is that a robot can fly about in, in lattice points."""
    parts, count = ndimage.label(clear[..., 0] > _PASSAGE_M)
    return int(np.bincount(parts.ravel())[1:].max()) if count else 0


def places(space: Space, rng: np.random.Generator, count: int, *, clearance_m: float) -> np.ndarray:
    """Return places from which one can fly about, (count, 3) m, with at least this clearance."""
    lattice = _lattice(space)
    clear = _clear(space, lattice)[..., 0]
    parts, _ = ndimage.label(clear > _PASSAGE_M)
    largest = np.argmax(np.bincount(parts.ravel())[1:]) + 1
    spots = lattice[..., 0, :][(parts == largest) & (clear > clearance_m)]
    if not len(spots):
        raise ValueError(f"nowhere in this space is a clearance of {clearance_m} m")
    found = np.empty((0, 3))
    while len(found) < count:
        tried = spots[rng.integers(len(spots), size=4 * count)].copy()
        tried[:, :2] += rng.uniform(-_LOOK_M / 2, _LOOK_M / 2, size=(len(tried), 2))
        tried[:, 2] += rng.uniform(-0.4, 0.5, size=len(tried))
        found = np.concatenate([found, tried[_clear(space, tried) > clearance_m]])
    return found[:count]
