"""The sorting table: seeds decide, words mean what they say, and what is held out is never shown."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("mujoco", reason="the sim extra is not installed")

from policy_client.chunk import ActionChunk
from policy_client.codec import unpack
from policy_client.protocol import PolicyProtocol
from policy_sim.sorting import Sorting
from policy_sim.sorting_camera import SIZE_PX
from policy_sim.sorting_closed_loop import main, over_the_network, summarise
from policy_sim.sorting_episode import (
    LIMIT_STEPS,
    Answer,
    evaluation_tasks,
    expert_policy,
    observe,
    random_policy,
    run_episode,
)
from policy_sim.sorting_expert import act, plan, right_thoughts, score_reasoning, think, wrong_reasoning
from policy_sim.sorting_pictures import Moment, plot_moments
from policy_sim.sorting_scene import HAND_HALF_M, REACH_M, STEP_S, TOP_SPEED_M_S, Scene, Task, draw_task
from policy_sim.sorting_words import (
    COLOURS,
    COMBINATIONS,
    HELD_OUT,
    KINDS,
    ORDERS,
    THINGS,
    THOUGHTS,
    TRAINED,
    Thing,
    Thought,
    say,
)
from policy_sim.success import wilson

RED_CUBE, BLUE_BALL = Thing("red", "cube"), Thing("blue", "ball")


def a_task(instruction="put the red cube in the left bin", things=(RED_CUBE, BLUE_BALL)):
    places = ((0.1, 0.1), (-0.1, -0.1), (0.1, -0.2))[: len(things)]
    return Task(ORDERS[instruction], things, places, (0.0,) * len(things), (0.0, 0.0))


def carried_out(scene, thought, limit_steps=40):
    """Follow one thought until its thing is where it says."""
    i = scene.task.things.index(thought.thing)
    steps = 0
    while scene.whereabouts(i) != thought.goal and steps < limit_steps:
        scene, steps = scene.after(act(scene, thought)), steps + 1
    return scene


@pytest.fixture(scope="module")
def world():
    with Sorting(a_task()) as world:
        yield world


def test_equal_seeds_give_equal_tasks_and_pictures(world):
    assert draw_task(3) == draw_task(3)
    assert draw_task(3) != draw_task(4)
    assert draw_task(3) != draw_task(3, held_out=True)
    pictures = []
    for seed in (3, 4, 3):
        world.reset(draw_task(seed))
        pictures.append(world.render())
    assert pictures[0].shape == (SIZE_PX, SIZE_PX, 3) and pictures[0].dtype == np.uint8
    assert np.array_equal(pictures[0], pictures[2])
    assert not np.array_equal(pictures[0], pictures[1])


def test_combinations_are_either_trained_or_held_out_and_everything_is_moved_in_training():
    assert frozenset(COMBINATIONS) == TRAINED | HELD_OUT and not TRAINED & HELD_OUT
    assert len(HELD_OUT) == 8
    assert {thing for thing, _ in TRAINED} == set(THINGS)
    for bin_ in ("left", "right"):
        assert {thing.colour for thing, goal in HELD_OUT if goal == bin_} == set(COLOURS)
        assert {thing.kind for thing, goal in HELD_OUT if goal == bin_} == set(KINDS)


@pytest.mark.parametrize("held_out", [False, True])
def test_tasks_move_only_combinations_of_their_own_set(held_out):
    for seed in range(300):
        task = draw_task(seed, held_out=held_out)
        assert set(task.moves.items()) <= (HELD_OUT if held_out else TRAINED)
        assert all(any(clause.covers(thing) for thing in task.things) for clause in task.order.clauses)
        assert len(set(task.things)) == len(task.things) in (2, 3)
        assert not Scene.of(task).done


def test_every_form_of_order_is_drawn_from_both_sets():
    forms = {order.form for order in ORDERS.values()}
    for held_out in (False, True):
        assert {draw_task(seed, held_out=held_out).order.form for seed in range(100)} == forms


def test_things_never_overlap_at_the_beginning():
    for seed in range(200):
        places = np.array(draw_task(seed).places)
        apart_m = np.linalg.norm(places[:, None] - places[None], axis=-1)
        assert apart_m[~np.eye(len(places), dtype=bool)].min() > 0.15


@pytest.mark.parametrize("held_out", [False, True])
def test_the_expert_carries_out_every_order_within_the_limits(held_out):
    for task in evaluation_tasks(100, held_out=held_out):
        scene, steps = Scene.of(task), 0
        while not scene.done:
            assert steps < LIMIT_STEPS
            action = act(scene, think(scene))
            assert np.hypot(*action[:2]) <= TOP_SPEED_M_S + 1e-6 and abs(action[2]) == 1.0
            assert np.hypot(*(action[:2] - scene.velocity)) <= 4.0 * STEP_S + 1e-6 or not action[:2].any()
            scene, steps = scene.after(action), steps + 1
        assert think(scene) is None


def test_the_expert_succeeds_with_chunks_as_well_and_is_always_right(world):
    episodes = [
        run_episode(world, expert_policy(world), task)
        for held_out in (False, True)
        for task in evaluation_tasks(5, held_out=held_out)
    ]
    summary = summarise(episodes)
    assert summary["success"] == {"rate": 1.0, "interval_95": [pytest.approx(0.7225, abs=1e-4), 1.0], "of": 10}
    assert summary["reasoning"]["rate"] == 1.0
    assert sum(results["of"] for results in summary["by_form"].values()) == 10


def test_random_motion_does_not_sort(world):
    episodes = [
        run_episode(world, random_policy(i), task) for i, task in enumerate(evaluation_tasks(3, held_out=False))
    ]
    assert not any(episode.succeeded for episode in episodes)
    assert all(episode.steps == LIMIT_STEPS for episode in episodes)
    assert summarise(episodes)["reasoning"] is None


def test_the_hand_stays_in_its_workspace_and_below_its_top_speed():
    scene = Scene.of(a_task())
    after = scene.after(np.array([9.0, -9.0, -1.0]))
    assert np.allclose(after.hand, [STEP_S * TOP_SPEED_M_S, -STEP_S * TOP_SPEED_M_S])
    for _ in range(20):
        after = after.after(np.array([9.0, -9.0, -1.0]))
    assert after.hand == (HAND_HALF_M[0], -HAND_HALF_M[1])


@pytest.mark.parametrize("action", [np.zeros(2), np.full(3, np.nan), np.zeros((1, 3))])
def test_an_action_that_is_not_three_finite_numbers_moves_nothing(world, action):
    world.reset(a_task())
    before = world.scene
    with pytest.raises(ValueError, match="three finite numbers"):
        world.step(action)
    assert world.scene == before


def test_a_closed_hand_takes_what_is_near_and_an_open_one_drops_it():
    near = replace(Scene.of(a_task()), hand=(0.1 + 0.9 * REACH_M, 0.1))
    far = replace(Scene.of(a_task()), hand=(0.1 + 1.1 * REACH_M, 0.1))
    close, open_ = np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.0, -1.0])
    assert far.after(close).held is None
    taken = near.after(close)
    assert taken.held == 0 and taken.state.tolist() == pytest.approx([*near.hand, 1.0])
    carried = taken.after(np.array([0.5, 0.0, 1.0]))
    assert carried.places[0] == carried.hand
    dropped = carried.after(open_)
    assert dropped.held is None and dropped.places[0] == carried.hand


def test_an_order_is_not_carried_out_while_something_else_lies_in_a_bin_or_in_the_hand():
    scene = carried_out(Scene.of(a_task()), Thought(RED_CUBE, "table", "left"))
    assert scene.done
    stray = carried_out(scene, Thought(BLUE_BALL, "table", "right"))
    assert not stray.done
    assert think(stray) == Thought(BLUE_BALL, "right", "table")
    mended = carried_out(stray, Thought(BLUE_BALL, "right", "table"))
    assert mended.done
    assert not replace(scene, held=1, closed=True).done


def test_every_picture_tells_kind_colour_and_place(world):
    def seen(*things):
        world.reset(a_task("put the red cube in the left bin", things))
        return world.render().astype(int)

    pictures = [seen(thing) for thing in THINGS]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert (np.abs(one - other).max(axis=-1) > 40).sum() > 15  # pixels
    both, swapped = seen(RED_CUBE, BLUE_BALL), seen(BLUE_BALL, RED_CUBE)
    assert (np.abs(both - swapped).max(axis=-1) > 40).sum() > 150


def test_the_bins_differ_and_the_hand_is_seen(world):
    world.reset(a_task())
    image = world.render().astype(int)
    left, right = image[50:60, 10:20].mean((0, 1)), image[50:60, 92:102].mean((0, 1))
    assert np.abs(left - right).max() > 40
    world.step(np.array([0.8, 0.0, -1.0]))
    assert (np.abs(world.render().astype(int) - image).max(axis=-1) > 40).sum() > 50


def test_every_sentence_is_of_one_meaning():
    assert len(ORDERS) == 64 + 8 + 8 + 12 + 12
    assert len(THOUGHTS) == 1 + 16 * (3 + 6)
    assert all(say(thought) == text for text, thought in THOUGHTS.items())
    assert say(Thought(RED_CUBE, "table", "left")) == (
        "The red cube is on the table. Pick it up and put it in the left bin."
    )
    assert say(Thought(RED_CUBE, "hand", "left")) == "Holding the red cube, carry it to the left bin."


def test_orders_mean_what_they_say():
    assert ORDERS["put the balls in the right bin"].bin_of(BLUE_BALL) == "right"
    assert ORDERS["put the balls in the right bin"].bin_of(RED_CUBE) is None
    sort = ORDERS["sort by colour: red left, blue right"]
    assert (sort.bin_of(RED_CUBE), sort.bin_of(BLUE_BALL)) == ("left", "right")
    assert sort.bin_of(Thing("green", "ball")) is None


def test_reasonings_are_scored_against_the_scene():
    scene = Scene.of(a_task("put everything red in the left bin", (RED_CUBE, BLUE_BALL, Thing("red", "ring"))))
    right = "The {} is on the table. Pick it up and put it in the left bin."
    assert score_reasoning(right.format("red cube"), scene)
    assert score_reasoning(right.format("red ring") + "\n", scene)
    assert not score_reasoning(right.format("blue ball"), scene)
    assert not score_reasoning(right.format("red ball"), scene)
    assert not score_reasoning(right.format("red cube").replace("left", "right"), scene)
    assert not score_reasoning("Holding the red cube, carry it to the left bin.", scene)
    assert not score_reasoning("All done.", scene)
    assert not score_reasoning("Pick up the red cube.", scene)
    held = replace(scene, held=0, closed=True)
    assert score_reasoning("Holding the red cube, carry it to the left bin.", held)
    assert not score_reasoning(right.format("red ring"), held)


def test_a_wrong_reasoning_is_followed_instead_of_the_order():
    for task in evaluation_tasks(20, held_out=False):
        scene = Scene.of(task)
        text = wrong_reasoning(scene, np.random.default_rng(0))
        assert not score_reasoning(text, scene)
        thought = THOUGHTS[text]
        end = carried_out(scene, thought)
        moved = [i for i, place in enumerate(end.places) if place != scene.places[i]]
        assert [task.things[i] for i in moved] == [thought.thing]
        assert end.whereabouts(moved[0]) == thought.goal
        assert not end.done


def test_a_plan_ends_with_its_thought_and_rests():
    scene = Scene.of(a_task("put everything red in the left bin", (RED_CUBE, BLUE_BALL, Thing("red", "ring"))))
    thought = think(scene)
    actions = plan(scene, thought, 40)
    for action in actions:
        scene = scene.after(action)
    assert scene.whereabouts(scene.task.things.index(thought.thing)) == "left"
    assert not scene.done and len(right_thoughts(scene)) == 1
    assert not actions[-10:, :2].any() and (actions[-10:, 2] == -1.0).all()


def test_options_reach_the_policy_and_its_words_are_kept(world):
    observations = []

    def policy(observation):
        observations.append(observation)
        return Answer(np.zeros((16, 3)), "All done.")

    def options(scene):
        return {"reasoning": say(think(scene))}

    episode = run_episode(world, policy, a_task(), options=options, play_steps=5, limit_steps=12, keep_frames=True)
    assert [asked.step for asked in episode.asked] == [0, 5, 10]
    assert [asked.right for asked in episode.asked] == [False] * 3
    assert observations[0]["options"] == {"reasoning": say(Thought(RED_CUBE, "table", "left"))}
    assert set(observations[0]) == {*observe(world), "options"}
    assert len(episode.frames) == 4 and episode.steps == 12 and not episode.succeeded
    with pytest.raises(ValueError, match="expected \\(H, 3\\)"):
        run_episode(world, lambda observation: Answer(np.zeros((16, 2))), a_task())


class WireClient:
    """Packs observations as the client does, and answers for a server that reasons."""

    def __init__(self):
        self.sent, self.resets = [], 0

    def reset(self):
        self.resets += 1

    def infer(self, observation):
        self.sent.append(unpack(PolicyProtocol().infer_request(observation, {})))
        return ActionChunk(np.zeros((16, 3), dtype=np.float32), STEP_S, 0.0, {"reasoning": "All done."})


def test_a_served_policy_gets_seeds_and_options_and_its_reasoning_is_read(world):
    client = WireClient()
    policy = over_the_network(client, seed=7)
    episode = run_episode(world, policy, a_task(), options=lambda scene: {"steps": 5}, limit_steps=16)
    assert client.resets == 1
    assert [request["options"] for request in client.sent] == [{"seed": 7000, "steps": 5}, {"seed": 7001, "steps": 5}]
    assert client.sent[0]["prompt"] == "put the red cube in the left bin"
    assert client.sent[0]["top"].shape == (SIZE_PX, SIZE_PX, 3)
    assert [asked.reasoning for asked in episode.asked] == ["All done."] * 2


def test_the_command_line_measures_the_expert(capsys):
    main(["expert", "--tasks", "3", "--execute", "16"])
    results = json.loads(capsys.readouterr().out)
    assert [results[name]["success"]["of"] for name in ("trained", "held_out")] == [3, 3]
    assert results["held_out"]["success"]["rate"] == results["held_out"]["reasoning"]["rate"] == 1.0


def test_pictures_are_small(world, tmp_path):
    world.reset(draw_task(0))
    moment = Moment(world.render(), world.scene.task.order.instruction, say(think(world.scene)))
    plot_moments([moment] * 12, tmp_path / "sorting.png")
    assert 5_000 < (tmp_path / "sorting.png").stat().st_size < 300_000


def test_intervals_are_wilsons():
    assert wilson(93, 100) == pytest.approx((0.8625, 0.9657), abs=1e-4)
