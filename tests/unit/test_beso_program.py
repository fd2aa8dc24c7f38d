"""BESO's agent without an engine: what it asks, and what it makes of the answers."""

from dataclasses import replace

import numpy as np
import pytest

from policy_models.program import GraphCall, Outcome, UnsuitableOptions
from policy_models.spec import Continuation, Observation, SamplerSpec, SamplingOptions
from policy_server.bundle import Bundle

STATE, GOAL = np.float32([0.1, 0.2, 0.3, 0.4]), np.float32([[1, 2, 3, 4]])


def _play(program, memory, options, observation=None) -> tuple[list[GraphCall], Outcome]:
    """Answer every question with a function of what was asked."""
    dialogue = program.infer(observation or Observation({}, STATE, GOAL), memory, options)
    calls, answer = [], None
    while True:
        try:
            calls.append(dialogue.send(answer))
        except StopIteration as finished:
            return calls, finished.value
        inputs = calls[-1].inputs
        answer = {"denoised": 0.5 * inputs["noisy"] + 0.01 * inputs["goal"].sum(axis=(1, 2))[:, None, None]}


def test_a_seed_decides_the_chunk(tiny_bundle: Bundle) -> None:
    program = tiny_bundle.new_program()
    first, again, other = (_play(program, program.begin(), SamplingOptions(seed))[1].actions for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_continuation_decides_how_much_of_the_first_noise_there_is(tiny_bundle: Bundle) -> None:
    program = tiny_bundle.new_program()
    horizon, width = tiny_bundle.spec.horizon, tiny_bundle.spec.action.width
    free = np.zeros((horizon, width), np.float32), np.zeros(horizon, np.float32)

    def first_x(noise: float) -> np.ndarray:
        continuation = Continuation(*free, strength=0.0, noise=noise)
        calls, _ = _play(program, program.begin(), SamplingOptions(1, continuation=continuation))
        return calls[0].inputs["noisy"]

    np.testing.assert_allclose(first_x(0.5), 0.5 * first_x(1.0))
    assert not first_x(0.0).any()


@pytest.mark.parametrize(("guidance", "rows"), [(0.0, 1), (1.0, 1), (1.5, 2)])
def test_guidance_asks_for_both_estimates_in_one_call(tiny_bundle: Bundle, guidance: float, rows: int) -> None:
    program = tiny_bundle.new_program()
    calls, _ = _play(program, program.begin(), SamplingOptions(1, guidance=guidance))
    assert [len(value) for call in calls for value in call.inputs.values()] == [rows] * 4 * len(calls)
    goal_free_last = not calls[0].inputs["goal"][-1].any()
    assert goal_free_last == (guidance != 1.0)


def test_what_a_goal_does_not_prescribe_is_zero_for_the_network(tiny_bundle: Bundle) -> None:
    program = tiny_bundle.new_program()
    calls, _ = _play(program, program.begin(), SamplingOptions(1))
    assert not calls[0].inputs["goal"][0, 0, 2:].any()
    assert calls[0].inputs["goal"][0, 0, :2].all()
    assert (GOAL == [[1, 2, 3, 4]]).all(), "the robot's own array was changed"


def test_left_out_goals_are_goal_free_whatever_the_guidance(tiny_bundle: Bundle) -> None:
    program = tiny_bundle.new_program()
    without = Observation({}, STATE, None)
    guided = _play(program, program.begin(), SamplingOptions(1, guidance=2.0), without)[1].actions
    free = _play(program, program.begin(), SamplingOptions(1, guidance=0.0))[1].actions
    np.testing.assert_array_equal(guided, free)


def test_a_request_decides_its_own_number_of_steps(tiny_bundle: Bundle) -> None:
    program = tiny_bundle.new_program()
    assert len(_play(program, program.begin(), SamplingOptions(1, steps=7))[0]) == 7
    assert len(_play(program, program.begin(), SamplingOptions(1, steps=7, sampler="heun"))[0]) == 13


def test_the_window_fills_and_then_slides(tiny_step_bundle: Bundle) -> None:
    program = tiny_step_bundle.new_program()
    memory, seen = program.begin(), []
    for step in range(5):
        observation = Observation({}, np.full(4, step, dtype=np.float32), GOAL)
        calls, outcome = _play(program, memory, SamplingOptions(step), observation)
        seen.append(calls[0].inputs["states"][0])
        memory = outcome.memory
    scaled = program.normalizer.normalize_state(np.arange(5, dtype=np.float32)[:, None].repeat(4, axis=1))
    np.testing.assert_array_equal(seen[0], [scaled[0], np.zeros(4), np.zeros(4)])
    np.testing.assert_array_equal(seen[1], [scaled[0], scaled[1], np.zeros(4)])
    np.testing.assert_array_equal(seen[4], scaled[2:5])


def test_a_dropped_request_leaves_its_session_as_it_was(tiny_step_bundle: Bundle) -> None:
    program = tiny_step_bundle.new_program()
    memory = _play(program, program.begin(), SamplingOptions(1))[1].memory
    before = {name: array.copy() for name, array in memory.items()}
    dialogue = program.infer(Observation({}, STATE, GOAL), memory, SamplingOptions(2))
    next(dialogue)
    dialogue.close()
    for name, array in before.items():
        np.testing.assert_array_equal(memory[name], array)


def test_a_schedule_with_too_few_levels_is_the_requests_mistake(tiny_bundle: Bundle) -> None:
    few = SamplerSpec("ddim", "iddpm", 3, 0.3, 0.5)
    program = type(tiny_bundle.new_program())(
        replace(tiny_bundle.spec, sampler=few), tiny_bundle.config, tiny_bundle.new_program().normalizer
    )
    with pytest.raises(UnsuitableOptions, match="fewer than 200 steps"):
        next(program.infer(Observation({}, STATE, GOAL), program.begin(), SamplingOptions(1, steps=200)))
