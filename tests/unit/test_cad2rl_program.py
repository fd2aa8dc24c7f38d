"""CAD2RL's agent: it flies where a collision is least likely, slower where one is likelier, and never too fast."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from policy_models.cad2rl import family
from policy_models.cad2rl.config import Steering, small
from policy_models.cad2rl.steering import limits, smooth, steer
from policy_models.cad2rl.train import make_spec
from policy_models.directions import CollisionSpec
from policy_models.families import FAMILIES
from policy_models.program import Assets
from policy_models.spec import Observation, SamplingOptions, VectorSpec

DIRECTIONS = CollisionSpec("front", 9, 13, (90.0, 60.0), 6.0)
STEERING = Steering()


def _with_hole(row: int, column: int, around: float = 1.0) -> np.ndarray:
    grid = np.full((9, 13), around)
    grid[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = 0.0
    return grid


@pytest.mark.parametrize(("row", "column"), [(4, 6), (4, 1), (4, 11), (1, 6), (7, 6), (2, 9)])
def test_it_flies_into_the_only_hole(row, column):
    velocity = steer(_with_hole(row, column), DIRECTIONS, STEERING)
    assert DIRECTIONS.bin_of(velocity[:3]) == (row, column)


def test_it_turns_towards_where_it_flies():
    assert steer(_with_hole(4, 2), DIRECTIONS, STEERING)[3] > 0.5
    assert steer(_with_hole(4, 10), DIRECTIONS, STEERING)[3] < -0.5
    assert steer(_with_hole(4, 6), DIRECTIONS, STEERING)[3] == 0


def test_where_all_is_alike_it_flies_straight_ahead():
    np.testing.assert_allclose(steer(np.zeros((9, 13)), DIRECTIONS, STEERING), [STEERING.speed_m_s, 0, 0, 0])


def test_a_gap_as_wide_as_a_ray_is_no_gap():
    grid = np.full((9, 13), 0.8)
    grid[4, 3] = 0.0
    grid[3:6, 8:11] = 0.2
    assert DIRECTIONS.bin_of(steer(grid, DIRECTIONS, STEERING)[:3]) == (4, 9)


def test_the_likelier_a_collision_the_slower_it_flies():
    speeds = [
        np.linalg.norm(steer(np.full((9, 13), likely), DIRECTIONS, STEERING)[:3]) for likely in np.linspace(0, 1, 21)
    ]
    assert speeds[0] == pytest.approx(STEERING.speed_m_s) and speeds[-1] == 0
    assert (np.diff(speeds) <= 1e-6).all()


def test_where_nothing_is_free_it_turns_on_the_spot_to_one_side_always():
    for seed in range(20):
        grid = np.random.default_rng(seed).uniform(0.95, 1.0, (9, 13))
        np.testing.assert_array_equal(steer(grid, DIRECTIONS, STEERING), np.float32([0, 0, 0, STEERING.turn_rad_s]))


def test_no_velocity_leaves_the_limits():
    low, high = limits(STEERING)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        velocity = steer(rng.random((9, 13)) ** rng.uniform(0.2, 3), DIRECTIONS, STEERING)
        assert (velocity >= low).all() and (velocity <= high).all()
        assert np.linalg.norm(velocity[:3]) <= STEERING.speed_m_s + 1e-6


def test_a_mirrored_grid_gives_the_mirrored_velocity():
    for seed in range(50):
        grid = np.random.default_rng(seed).uniform(0, 0.8, (9, 13))
        np.testing.assert_allclose(
            steer(grid[:, ::-1], DIRECTIONS, STEERING), steer(grid, DIRECTIONS, STEERING) * [1, -1, 1, -1], atol=1e-6
        )


def test_smoothing_keeps_the_mean_of_what_is_far_from_the_edges():
    grid = np.zeros((9, 13))
    grid[4, 6] = 16.0
    np.testing.assert_allclose(smooth(grid)[3:6, 5:8], [[1, 2, 1], [2, 4, 2], [1, 2, 1]])
    np.testing.assert_allclose(smooth(np.full((9, 13), 0.3)), 0.3)


def test_a_robot_that_flies_level_never_climbs():
    level = CollisionSpec("front", 1, 13, (90.0, 0.0), 6.0)
    for seed in range(20):
        assert steer(np.random.default_rng(seed).random((1, 13)), level, STEERING)[2] == 0


@pytest.mark.parametrize(
    "changes", [{"speed_m_s": 0.0}, {"calm": 0.9, "blocked": 0.5}, {"blocked": 1.5}, {"straight": -0.1}]
)
def test_a_steering_that_cannot_be_is_refused(changes):
    with pytest.raises(ValueError, match=r"steering"):
        Steering(**changes)


def _program():
    config = small()
    return family.make_program(make_spec(config, DIRECTIONS), config, Assets())


def test_one_look_gives_one_velocity_and_the_grid_that_it_came_from():
    program = _program()
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    dialogue = program.infer(Observation({"front": image}, None, None), program.begin(), SamplingOptions(0))
    call = next(dialogue)
    assert call.graph == "look"
    np.testing.assert_array_equal(call.inputs["image"], image[None])
    grid = np.random.default_rng(1).random((9, 13)).astype(np.float32)
    with pytest.raises(StopIteration) as ended:
        dialogue.send({"collision": grid[None]})
    outcome = ended.value.value
    np.testing.assert_array_equal(outcome.collision, grid)
    np.testing.assert_array_equal(outcome.actions, steer(grid, DIRECTIONS, STEERING)[None])
    assert outcome.actions.shape == (1, 4) and outcome.actions.dtype == np.float32
    assert not outcome.memory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": VectorSpec(("x", "y"), ("m", "m"))}, "actions are forward, left, up, yaw_rate"),
        ({"collision": None}, "needs one camera and a collision grid"),
        ({"collision": replace(DIRECTIONS, rows=5)}, "collision grid is 5x13, but the network has 9x13"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(changes, message):
    config = small()
    with pytest.raises(ValueError, match=message):
        family.make_program(replace(make_spec(config, DIRECTIONS), **changes), config, Assets())


def test_the_family_is_registered_and_its_configuration_survives_a_manifest():
    from pydantic import TypeAdapter

    assert FAMILIES["cad2rl"] == family.__name__
    assert TypeAdapter(family.Config).validate_python(asdict(small())) == small()
