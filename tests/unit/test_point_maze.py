"""The simulated maze, its expert, its play data and its pictures behave as their users assume."""

import os
from pathlib import Path

import numpy as np
import pytest
from gymnasium_robotics.envs.maze.maps import MEDIUM_MAZE
from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv
from PIL import Image, ImageSequence

from policy_sim.episode import Episode, held_out_tasks, random_policy, run_episode
from policy_sim.expert import WaypointExpert
from policy_sim.grid import CELL_M
from policy_sim.pictures import plot_paths, write_gif
from policy_sim.play import Disturbance, GoalChanges, collect
from policy_sim.point_maze import BALL_RADIUS_M, GRID, REACHED_M, STEP_S, PointMaze

EAST = np.array([1.0, 0.0], dtype=np.float32)
STILL = np.zeros(2, dtype=np.float32)
FORKED_START, FORKED_GOAL = GRID.centre_of((6, 2)), GRID.centre_of((3, 2))  # a ring of cells lies between them


@pytest.fixture(scope="module")
def maze() -> PointMaze:
    return PointMaze()


def drive(maze: PointMaze, start: np.ndarray, goal: np.ndarray, *, seed: int = 0) -> Episode:
    return run_episode(maze, WaypointExpert(GRID, seed=seed).act, start=start, goal=goal)


def test_a_held_action_moves_the_ball_as_the_original_environment_does(maze: PointMaze) -> None:
    original = PointMazeEnv(maze_map=MEDIUM_MAZE)
    os.remove(original.tmp_xml_file_path)
    original.reset(seed=0)
    maze.reset(0, start=original.reset_pos)
    rng = np.random.default_rng(1)
    for _ in range(40):
        action = rng.choice([-1.0, 1.0], size=2)  # strong enough to meet walls and the velocity clip
        for _ in range(5):
            observation, *_ = original.step(action)
        state = maze.step(action)
        np.testing.assert_allclose(state, observation["observation"], atol=1e-6)
    original.close()


def test_the_same_seed_and_actions_give_the_same_states(maze: PointMaze) -> None:
    first, second = (run_episode(maze, random_policy(3), seed=5, limit_steps=60) for _ in range(2))
    np.testing.assert_array_equal(first.states, second.states)


def test_an_earlier_episode_leaves_no_trace(maze: PointMaze) -> None:
    fresh = run_episode(PointMaze(), random_policy(3), seed=5, limit_steps=60)
    run_episode(maze, random_policy(4), seed=6, limit_steps=60)
    used = run_episode(maze, random_policy(3), seed=5, limit_steps=60)
    np.testing.assert_array_equal(fresh.states, used.states)


def test_a_control_step_lasts_50_ms(maze: PointMaze) -> None:
    start = maze.reset(0, start=GRID.centre_of((3, 2)))
    maze.step(0.2 * EAST)
    before = maze.state
    after = maze.step(STILL)
    assert after[0] - before[0] == pytest.approx(before[2] * STEP_S, rel=0.05)
    assert after[0] > start[0]


def test_a_wall_stops_the_ball(maze: PointMaze) -> None:
    maze.reset(0, start=GRID.centre_of((1, 2)))
    for _ in range(60):
        state = maze.step(EAST)
    wall_x_m = GRID.centre_of((1, 2))[0] + CELL_M / 2
    assert state[0] == pytest.approx(wall_x_m - BALL_RADIUS_M, abs=0.02)
    assert abs(state[2]) < 0.01


def test_speed_stays_near_the_clip_of_5_m_s(maze: PointMaze) -> None:
    maze.reset(0, start=GRID.centre_of((3, 2)))
    speeds_m_s = [abs(maze.step(EAST)[2]) for _ in range(8)]
    assert 4.5 < max(speeds_m_s) < 5.3


@pytest.mark.parametrize("action", [np.zeros(3), np.array([np.nan, 0.0]), np.array([0.0, np.inf])])
def test_an_action_that_is_not_two_finite_numbers_is_refused(maze: PointMaze, action: np.ndarray) -> None:
    before = maze.reset(0)
    with pytest.raises(ValueError, match="two finite numbers"):
        maze.step(action)
    np.testing.assert_array_equal(maze.state, before)


@pytest.mark.parametrize("name", ["start", "goal"])
def test_a_place_inside_a_wall_is_refused(maze: PointMaze, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        maze.reset(0, **{name: GRID.centre_of((0, 0))})


def test_the_expert_reaches_the_goal_from_every_region(maze: PointMaze) -> None:
    centre = GRID.centre_of((4, 4))
    for cell in GRID.free:
        assert drive(maze, GRID.centre_of(cell), centre).reached, f"not reached from cell {cell}"
        assert drive(maze, centre, GRID.centre_of(cell)).reached, f"cell {cell} not reached"


def test_the_expert_touches_no_wall(maze: PointMaze) -> None:
    for task in held_out_tasks(20):
        for x_m, y_m in drive(maze, task.start, task.goal).states[:, :2]:
            for side_m in (-0.15, 0.15):
                assert GRID.is_free(GRID.cell_of(x_m + side_m, y_m))
                assert GRID.is_free(GRID.cell_of(x_m, y_m + side_m))


def test_the_expert_comes_to_rest_at_the_goal(maze: PointMaze) -> None:
    expert, state = WaypointExpert(GRID, seed=0), maze.reset(0, start=FORKED_START, goal=FORKED_GOAL)
    for _ in range(150):
        state = maze.step(expert.act(state, maze.goal))
    np.testing.assert_allclose(state, [*FORKED_GOAL, 0.0, 0.0], atol=0.01)


def test_the_expert_finds_its_way_back_after_a_push(maze: PointMaze) -> None:
    expert, state = WaypointExpert(GRID, seed=0), maze.reset(0, start=FORKED_START, goal=FORKED_GOAL)
    for step in range(300):
        state = maze.step(EAST if 10 <= step < 20 else expert.act(state, maze.goal))
    assert maze.reached


def test_two_seeds_take_different_routes_between_the_same_pair(maze: PointMaze) -> None:
    cells_seen = []
    for seed in range(6):
        episode = drive(maze, FORKED_START, FORKED_GOAL, seed=seed)
        cells_seen.append(frozenset(GRID.cell_of(x_m, y_m) for x_m, y_m in episode.states[:, :2].tolist()))
    assert len(set(cells_seen)) >= 2


def test_random_pushing_seldom_reaches_the_goal(maze: PointMaze) -> None:
    tasks = held_out_tasks(8)
    reached = [run_episode(maze, random_policy(i), start=t.start, goal=t.goal).reached for i, t in enumerate(tasks)]
    assert np.mean(reached) < 0.5


def test_held_out_tasks_are_far_apart_and_always_the_same() -> None:
    for first, second in zip(held_out_tasks(50), held_out_tasks(50), strict=True):
        np.testing.assert_array_equal(first.start, second.start)
        np.testing.assert_array_equal(first.goal, second.goal)
        assert GRID.path_cells(GRID.cell_of(*first.start), GRID.cell_of(*first.goal)) >= 4


def test_play_visits_several_goals_and_reaches_them() -> None:
    play = collect(3, seed=0, length_steps=300, goal_changes=GoalChanges(abandon_probability=0.0))
    changed = np.any(play["goals"][:, 1:] != play["goals"][:, :-1], axis=-1)
    assert changed.sum(axis=1).min() >= 2
    assert play["reached"][:, :-1][changed].mean() > 0.9, "goals changed before they were reached"
    distances_m = np.linalg.norm(play["states"][..., :2] - play["goals"], axis=-1)
    np.testing.assert_array_equal(play["reached"], distances_m < REACHED_M)


def test_play_is_the_same_for_the_same_seed_and_differs_for_another() -> None:
    first, again, other = (collect(1, seed=seed, length_steps=100) for seed in (0, 0, 1))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert not np.array_equal(first["states"], other["states"])


def test_without_disturbance_the_executed_action_is_the_intended_one() -> None:
    calm = Disturbance(noise_std=0.0, kick_probability=0.0)
    play = collect(1, seed=0, length_steps=100, disturbance=calm)
    np.testing.assert_array_equal(play["executed"], play["intended"])
    assert not play["kicked"].any()


def test_executed_actions_lead_from_each_state_to_the_next(maze: PointMaze) -> None:
    play = collect(1, seed=2, length_steps=100)
    states = [maze.reset(0, start=play["states"][0, 0, :2])]
    states += [maze.step(action) for action in play["executed"][0, :-1]]
    np.testing.assert_allclose(np.stack(states), play["states"][0], atol=1e-3)


def test_pictures_are_written_at_the_size_of_a_readme(maze: PointMaze, tmp_path: Path) -> None:
    task = held_out_tasks(1)[0]
    episodes = [drive(maze, task.start, task.goal, seed=seed) for seed in range(2)]
    chunks = [[episode.states[step : step + 8, :2] for step in range(episode.steps)] for episode in episodes]
    plot_paths(episodes, tmp_path / "paths.png", title="two drives")
    write_gif(episodes, tmp_path / "drives.gif", chunks=chunks)
    with Image.open(tmp_path / "paths.png") as still:
        assert 600 <= still.width <= 1000
    with Image.open(tmp_path / "drives.gif") as animation:
        assert animation.width <= 840
        assert sum(1 for _ in ImageSequence.Iterator(animation)) > 10
    assert (tmp_path / "drives.gif").stat().st_size < 1.5e6
