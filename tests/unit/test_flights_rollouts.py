"""What comes of flying in a direction, and files of it."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco", reason="the sim extra is not installed")

from policy_sim.flights_directions import Directions, in_world
from policy_sim.flights_field import Field
from policy_sim.flights_rollouts import Rollouts
from policy_sim.flights_space import Solid, Space
from policy_sim.flights_views import FREE_M, Settings, collect, main

SMALL = Settings(px=16, views=20, tries=4, directions=Directions(rows=3, columns=5))


def _corridor() -> Field:
    """2 m wide, 2.5 m high, from x = 0 to 20 m, with a wall at its end."""
    sides = [Solid("wall", "box", (10.0, y, 1.25), (10.0, 0.25, 1.25)) for y in (0.25, 2.75)]
    end = Solid("wall", "box", (20.0, 1.5, 1.25), (0.25, 1.5, 1.25))
    return Field(Space((*sides, end), np.ones((41, 6), dtype=bool), 2.5))


def _collisions(directions: Directions, rollouts: Rollouts, x_m: float = 3.0) -> np.ndarray:
    yaws = np.zeros(1)
    headings = in_world(directions.headings, yaws)
    position = np.array([[x_m, 1.5, 1.25]])
    rng = np.random.default_rng(0)
    return rollouts.collisions(_corridor(), position, yaws, headings, directions.reach_m, rng)


def test_along_a_corridor_is_safe_and_into_its_walls_is_not() -> None:
    directions = Directions(rows=1, columns=9, fov_deg=(120.0, 0.0), reach_m=4.0)
    collided = _collisions(directions, Rollouts(repeats=20))[0]
    assert collided[4] < 0.25
    assert min(collided[0], collided[-1]) > 0.8
    assert np.all(np.diff(collided[:5]) <= 0.15), "the further from the wall, the safer"


def test_a_collision_counts_less_the_further_it_is() -> None:
    ahead = Directions(rows=1, columns=3, fov_deg=(10.0, 0.0), reach_m=6.0)
    rollouts = Rollouts(first_m=6.0, discount=0.8, repeats=1)
    near, far = (_collisions(ahead, rollouts, x_m)[0, 1] for x_m in (18.5, 16.0))
    assert near == pytest.approx(0.8 ** (19.75 - 0.2 - 18.5), abs=0.02)
    assert far == pytest.approx(0.8 ** (19.75 - 0.2 - 16.0), abs=0.02)
    assert _collisions(ahead, rollouts, 3.0)[0, 1] == 0, "beyond the reach nothing counts"


def test_a_first_direction_that_is_not_free_collides() -> None:
    views = collect(20, SMALL)
    rows, columns = np.moveaxis(views["bins"], -1, 0)
    free = np.take_along_axis(views["free"].reshape(20, -1), rows * 5 + columns, axis=1)
    assert np.all(views["collided"][free == 0] >= SMALL.rollouts.discount**FREE_M)
    assert free.min() == 0 and free.max() == 1


def test_more_views_begin_with_the_same() -> None:
    few, more = (collect(count, SMALL) for count in (15, 25))
    assert len(more["images"]) == 25
    for name in ("images", "free", "bins", "collided"):
        np.testing.assert_array_equal(few[name], more[name][:15])


def test_the_command_writes_a_file_that_says_what_it_holds(tmp_path: Path) -> None:
    main(["-o", str(tmp_path / "views.npz"), "--views", "3", "--px", "16", "--randomise", "textures"])
    views = np.load(tmp_path / "views.npz")
    spec = json.loads(str(views["spec"]))
    assert (spec["randomise"], spec["px"], spec["rows"], spec["columns"]) == ("textures", 16, *views["free"].shape[1:])
    assert views["images"].shape == (3, 16, 16, 3) and views["images"].dtype == np.uint8
