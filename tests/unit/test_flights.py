"""Spaces to fly in, what their cameras see, and flights."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

pytest.importorskip("mujoco", reason="the sim extra is not installed")

from policy_sim.flights import STEP_S, TOP_SPEED_M_S, Flights
from policy_sim.flights_camera import TEXTURES, FlightsCamera
from policy_sim.flights_directions import Directions, in_world
from policy_sim.flights_field import Field
from policy_sim.flights_looks import draw_look
from policy_sim.flights_plans import HELD_OUT_THINGS, THINGS, make_space, places
from policy_sim.flights_space import ROBOT_RADIUS_M, Solid, Space
from policy_sim.flights_textures import HELD_OUT_TEXTURES, draw_texture
from policy_sim.flights_textures import TEXTURES as TRAINING_TEXTURES

RNG = np.random.default_rng(0)
STRAIGHT = np.array([1.0, 0.0, 0.0, 0.0])


@pytest.fixture
def flights() -> Iterator[Flights]:
    with closing(Flights(3, size_px=32)) as flights:
        yield flights


@pytest.mark.parametrize("shape", ["box", "cylinder"])
def test_a_solid_is_as_far_as_the_nearest_point_of_its_surface(shape: str) -> None:
    half = (0.6, 0.6 if shape == "cylinder" else 0.3, 0.8)
    solid = Solid("thing", shape, (1.0, 2.0, 0.8), half, yaw_rad=0.7)  # type: ignore[arg-type]
    inside = RNG.uniform(-1.0, 1.0, size=(40_000, 3)) * (0.9, 0.9, 0.9) + solid.centre
    inside = inside[solid.distance(inside) <= 0]
    for point in RNG.uniform(-2.0, 2.0, size=(20, 3)) + solid.centre:
        nearest = np.linalg.norm(inside - point, axis=1).min()
        assert solid.distance(point[None])[0] == pytest.approx(nearest, abs=0.08) or solid.distance(point[None])[0] <= 0


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_a_space_is_closed_and_can_be_flown_about(seed: int, held_out: bool) -> None:
    space = make_space(seed, held_out=held_out)
    starts = np.asarray(places(space, np.random.default_rng(seed), 16, clearance_m=0.4))
    assert np.all(space.inside(starts)) and np.all(space.clearance(starts) > 0.4)
    yaws = np.linspace(-np.pi, np.pi, 12)
    level = np.stack([np.cos(yaws), np.sin(yaws), np.zeros_like(yaws)], axis=-1)
    flown = Field(space).sweep(starts, np.broadcast_to(level, (16, 12, 3)), 100.0)
    assert flown.max() < np.hypot(*space.size_m[:2]), "somebody flew out of the building"


def test_spaces_repeat_and_those_held_out_are_others() -> None:
    assert make_space(5, held_out=True).solids == make_space(5, held_out=True).solids
    kinds = {solid.kind for seed in range(6) for solid in make_space(seed, held_out=True).solids}
    assert kinds - {"wall", "lintel"} <= set(HELD_OUT_THINGS)
    assert not (set(HELD_OUT_THINGS) - {"person"}) & set(THINGS)
    assert not set(HELD_OUT_TEXTURES) & set(TRAINING_TEXTURES)


def test_a_field_tells_nearly_the_exact_clearance() -> None:
    space = make_space(1, held_out=False)
    points = np.asarray(places(space, np.random.default_rng(0), 300, clearance_m=0.1))
    exact = np.minimum(space.clearance(points), 1.0)
    np.testing.assert_allclose(Field(space).clearance(points), exact, atol=0.08)


def test_a_sweep_ends_where_the_robot_touches_a_wall() -> None:
    wall = Solid("wall", "box", (3.0, 1.5, 1.25), (0.1, 1.5, 1.25))
    field = Field(Space((wall,), np.ones((10, 6), dtype=bool), 2.5))
    flown = field.sweep(np.array([[1.0, 1.5, 1.25]]), np.array([[[1.0, 0, 0], [0, 0, 1.0], [-0.6, 0, 0.8]]]), 5.0)
    assert flown[0, 0] == pytest.approx(2.9 - 1.0 - ROBOT_RADIUS_M, abs=0.06)
    assert flown[0, 1] == pytest.approx(2.5 - 1.25 - ROBOT_RADIUS_M, abs=0.06)
    assert flown[0, 2] == pytest.approx((2.5 - 1.25 - ROBOT_RADIUS_M) / 0.8, abs=0.08)


def test_directions_turn_with_the_robot() -> None:
    directions = Directions(rows=3, columns=5)
    assert np.argmax(directions.headings[..., 1].max(axis=0)) == 0, "the leftmost column comes first"
    assert np.argmax(directions.headings[..., 2].max(axis=1)) == 0, "the highest row comes first"
    turned = in_world(directions.headings, np.array([np.pi / 2]))
    middle = turned.reshape(3, 5, 3)[1, 2]
    np.testing.assert_allclose(middle, [0.0, 1.0, 0.0], atol=1e-12)


@pytest.mark.parametrize("held_out", [False, True])
def test_textures_have_no_seam(held_out: bool) -> None:
    for seed in range(12):
        texture = draw_texture(np.random.default_rng(seed), held_out=held_out).astype(float)
        inner = np.abs(np.diff(texture, axis=0)).mean(axis=(1, 2)).max()
        assert np.abs(texture[0] - texture[-1]).mean() <= 1.5 * inner + 2


def test_looks_change_as_much_as_they_are_told_to() -> None:
    space = make_space(2, held_out=False)
    place = np.asarray(places(space, np.random.default_rng(0), 1, clearance_m=0.5))[0]
    with closing(FlightsCamera(space, held_out=False, seed=2, size_px=32)) as camera:

        def pictures(randomise: str) -> list[np.ndarray]:
            rngs = (np.random.default_rng(seed) for seed in (1, 2))
            return [camera.render(place, 0.3, draw_look(rng, camera.kinds, TEXTURES, randomise)) for rng in rngs]  # type: ignore[arg-type]

        one, same = pictures("none")
        np.testing.assert_array_equal(one, same)
        assert one.std() > 3, "there is something to see"
        for randomise in ("textures", "all"):
            one, other = pictures(randomise)
            assert np.abs(one.astype(int) - other).mean() > 3


def test_what_is_near_fills_the_picture() -> None:
    block = Solid("crate", "box", (3.0, 2.0, 1.25), (0.25, 0.25, 0.25))
    space = Space((block,), np.ones((12, 8), dtype=bool), 2.5)
    with closing(FlightsCamera(space, held_out=False, seed=0, size_px=160)) as camera:
        look = draw_look(np.random.default_rng(0), camera.kinds, TEXTURES, "none")
        blue = [
            float((image[..., 2] > image[..., 0].astype(int) + 15).mean())
            for image in (camera.render(np.array([x, 2.0, 1.25]), 0.0, look) for x in (0.5, 1.5, 2.25))
        ]
    # Half a metre wide at distances of 2.25, 1.25 and 0.5 m, 90 degrees of view.
    np.testing.assert_allclose(blue, [(0.5 / (2 * far)) ** 2 for far in (2.25, 1.25, 0.5)], rtol=0.25)


def test_a_robot_flies_as_it_is_told(flights: Flights) -> None:
    before = flights.position.copy()
    assert not flights.step(np.array([0.0, 0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(flights.position, before)
    assert flights.yaw_rad == pytest.approx(flights.start.yaw_rad + 1.0 * STEP_S)
    flights.step(10 * STRAIGHT)
    assert flights.flown_m == pytest.approx(TOP_SPEED_M_S * STEP_S), "nobody is faster than the top speed"


def test_a_robot_that_flies_straight_ahead_ends_at_what_is_ahead(flights: Flights) -> None:
    ahead = flights.room(Directions(rows=1, columns=3, fov_deg=(40.0, 0.0), reach_m=30.0))[0, 1]
    while not flights.step(STRAIGHT):
        assert flights.flown_m < 30
    assert flights.collided
    assert flights.flown_m == pytest.approx(ahead, abs=0.12)
    assert float(flights.space.clearance(flights.position)) >= ROBOT_RADIUS_M


def test_a_flight_begins_again_as_it_began(flights: Flights) -> None:
    first = flights.image()
    for _ in range(5):
        flights.step(np.array([0.3, 0.1, 0.0, 0.4]))
    flights.reset()
    assert flights.flown_m == 0 and not flights.collided and len(flights.path) == 1
    np.testing.assert_array_equal(flights.image(), first)
