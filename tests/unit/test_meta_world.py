"""Meta-World's scenes: both tasks judged in one, beginnings that do not tell, demonstrations that do not differ."""

import numpy as np
import pytest

pytest.importorskip("metaworld", reason="the meta-world extra is not installed")

from policy_sim.meta_world import MetaWorld
from policy_sim.meta_world_demos import FIRST_HELD_OUT_SEED, Noise, Settings, collect
from policy_sim.meta_world_episode import expert_policy, held_out_seeds, random_policy, run_episode
from policy_sim.meta_world_tasks import SCENES, TASKS, other_task

SIZE_PX = 48


NOISY = Settings(size_px=16, noise=Noise(levels=(0.3,)))


@pytest.fixture(scope="module")
def demos():
    return collect(1, NOISY)


@pytest.fixture(scope="module", params=list(SCENES))
def world(request):
    with MetaWorld(request.param, size_px=SIZE_PX) as world:
        yield world


def test_every_scene_has_the_tasks_that_name_it():
    for scene in SCENES.values():
        assert {name for name, task in TASKS.items() if task.scene == scene.name} == set(scene.tasks)
        first, second = scene.tasks
        assert (other_task(first), other_task(second)) == (second, first)


def test_no_phrase_asks_for_two_things_or_is_both_held_out_and_trained_on():
    phrases = [phrase for task in TASKS.values() for phrase in (*task.phrases, *task.held_out_phrases)]
    assert len(phrases) == len(set(phrases))


def test_the_experts_do_what_they_are_told_and_not_the_other_task(world):
    for task in world.scene.tasks:
        for seed in held_out_seeds(2):
            world.reset(seed)
            done: frozenset[str] = frozenset()
            steps = 0
            while not done and steps < 100:
                done, steps = world.step(world.expert_action(task)), steps + 1
            assert done == {task}


def test_a_beginning_depends_on_nothing_but_its_seed(world):
    world.reset(7)
    images, state, joint = world.render(), world.state, world.joint
    for _ in range(20):
        world.step(world.expert_action(world.scene.tasks[0]))
    assert not np.array_equal(world.render()["static"], images["static"])
    world.reset(8)
    assert world.joint != joint
    world.reset(7)
    assert world.joint == joint
    assert np.array_equal(world.state, state)
    assert all(np.array_equal(image, images[name]) for name, image in world.render().items())


def test_neither_task_is_done_at_the_beginning(world):
    for seed in range(20):
        world.reset(seed)
        assert world.step(np.zeros(4)) == frozenset()
        assert world.scene.joint_start[0] - 0.02 < world.joint < world.scene.joint_start[1] + 0.02


def test_markers_of_goals_are_not_seen(world):
    world.reset(3)
    images = world.render()
    model = world._env.model
    positions = model.site_pos.copy()
    try:
        for i in range(model.nsite):
            if model.site(i).name.startswith("goal"):
                model.site_pos[i] = [0.0, 0.6, 0.2]
        world.step(np.zeros(4))
        world.reset(3)
        again = world.render()
    finally:
        model.site_pos[:] = positions
    assert all(np.array_equal(again[name], images[name]) for name in images)


def test_both_cameras_see_the_joint_move(world):
    world.reset(3)
    before = world.render()
    assert {name: image.shape for name, image in before.items()} == {
        "static": (SIZE_PX, SIZE_PX, 3),
        "wrist": (SIZE_PX, SIZE_PX, 3),
    }
    for _ in range(70):
        world.step(world.expert_action(world.scene.tasks[0]))
    after = world.render()
    assert all((before[name] != after[name]).mean() > 0.05 for name in before)


@pytest.mark.parametrize("action", [np.zeros(3), np.full(4, np.nan), np.zeros((1, 4))])
def test_an_action_that_is_not_four_finite_numbers_moves_nothing(world, action):
    world.reset(0)
    state = world.state
    with pytest.raises(ValueError, match="four finite numbers"):
        world.step(action)
    assert np.array_equal(world.state, state)


def test_an_episode_tells_which_of_both_tasks_was_done():
    with MetaWorld("drawer", size_px=SIZE_PX) as world:
        expert = expert_policy(world)
        episode = run_episode(world, expert, instruction="close the drawer", seed=FIRST_HELD_OUT_SEED, keep_frames=True)
        assert episode.succeeded("drawer-close")
        assert not episode.succeeded("drawer-open")
        assert episode.done_at == {"drawer-close": episode.steps}
        assert len(episode.actions) == episode.steps == len(episode.frames) - 1  # this policy's chunks are one action

        lost = run_episode(world, random_policy(0), instruction="close the drawer", seed=0, limit_steps=12)
        assert (lost.steps, lost.done_at, lost.frames) == (12, {}, ())

        with pytest.raises(ValueError, match=r"\(4,\), expected \(H, 4\)"):
            run_episode(world, lambda images, instruction: np.zeros(4), instruction="", seed=0)


def test_demonstrations_of_both_tasks_begin_alike_and_come_out_alike_again(demos):
    again = collect(1, NOISY)
    assert all(np.array_equal(demos[name], again[name]) for name in demos)

    count = len(demos["task"])
    assert demos["static"].shape == demos["wrist"].shape == (count, 16, 16, 3)
    assert demos["actions"].shape == (count, 16, 4)
    assert np.abs(demos["actions"]).max() <= 1.0
    assert demos["task_names"].tolist() == list(TASKS)
    first = {demos["task_names"][demos["task"][i]]: demos["static"][i] for i in np.flatnonzero(demos["step"] == 0)}
    for task in TASKS:
        assert np.array_equal(first[task], first[other_task(task)])


def test_a_chunk_goes_on_where_the_one_before_it_was_four_steps_in_and_ends_at_rest(demos):
    for episode in np.unique(demos["episode"]):
        chunks = demos["actions"][demos["episode"] == episode]
        assert np.array_equal(chunks[1:, :12], chunks[:-1, 4:])
        assert not chunks[-1, 4:, :3].any()
        assert (chunks[-1, :, 3] == chunks[-1, 0, 3]).all()
