"""MoDE's agent: what it asks its graphs, and what it remembers."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from policy_models.diffusion.samplers import SAMPLERS, run
from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels
from policy_models.mode.network import ModeDiT
from policy_models.mode.program import GoalMemory
from policy_models.mode.routing import Routes, asked_levels
from policy_models.program import Outcome, Program, UnsuitableGoal, UnsuitableOptions
from policy_models.spec import Observation, SamplingOptions
from policy_server.bundle import Bundle
from policy_server.engine.base import ENGINES, Engine
from policy_server.golden import draw_observation


class Counting:
    """The oracle, counting what it is asked."""

    def __init__(self, bundle: Bundle) -> None:
        self.engine: Engine = ENGINES["torch"].make(bundle, 1)
        self.calls: Counter[str] = Counter()
        self.rows: list[int] = []

    def chunk(self, program: Program, observation: Observation, **options: Any) -> np.ndarray:
        """Answer one observation."""
        dialogue = program.infer(observation, program.begin(), SamplingOptions(**{"seed": 0, **options}))
        answer = None
        while True:
            try:
                call = dialogue.send(answer) if answer is not None else next(dialogue)
            except StopIteration as finished:
                outcome: Outcome = finished.value
                return outcome.actions
            self.calls[call.graph] += 1
            if call.graph == "denoise":
                self.rows.append(len(call.inputs["sigma"]))
            answer = self.engine.run(call.graph, call.inputs)


@pytest.fixture
def oracle(tiny_mode_bundle: Bundle) -> Counting:
    return Counting(tiny_mode_bundle)


@pytest.fixture
def observation(tiny_mode_bundle: Bundle) -> Observation:
    return draw_observation(tiny_mode_bundle.spec, np.random.default_rng(1))


def _told(observation: Observation, goal: str) -> Observation:
    return Observation(observation.images, None, goal)


def test_it_looks_once_a_chunk_and_reads_each_instruction_once(
    tiny_mode_bundle: Bundle, oracle: Counting, observation: Observation
) -> None:
    program = tiny_mode_bundle.new_program()
    for _ in range(3):
        oracle.chunk(program, _told(observation, "open the drawer"))
    assert oracle.calls == {"language": 1, "perceive": 3, "denoise": 9}
    oracle.chunk(program, _told(observation, "close the drawer"))
    assert oracle.calls["language"] == 2
    oracle.chunk(tiny_mode_bundle.new_program(), _told(observation, "close the drawer"))
    assert oracle.calls["language"] == 3, "what one engine embedded is not another's"


def test_the_instruction_and_the_images_matter(
    tiny_mode_bundle: Bundle, oracle: Counting, observation: Observation
) -> None:
    program = tiny_mode_bundle.new_program()
    opened = oracle.chunk(program, _told(observation, "open the drawer"))
    np.testing.assert_array_equal(oracle.chunk(program, _told(observation, "open the drawer")), opened)
    assert np.abs(oracle.chunk(program, _told(observation, "close the drawer")) - opened).max() > 1e-3
    for camera in observation.images:
        changed = {**observation.images, camera: 255 - observation.images[camera]}
        seen = oracle.chunk(program, Observation(changed, None, "open the drawer"))
        assert np.abs(seen - opened).max() > 1e-4, camera


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_sampler_with_any_steps_just_works(
    tiny_mode_bundle: Bundle, oracle: Counting, observation: Observation, sampler: str, steps: int
) -> None:
    actions = oracle.chunk(tiny_mode_bundle.new_program(), observation, sampler=sampler, steps=steps)
    assert np.isfinite(actions).all()


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 3), ("heun", 4), ("dpmpp_2s", 5), ("euler_ancestral", 10)])
@torch.inference_mode()
def test_settled_routes_give_what_routing_every_step_gives(
    tiny_mode_bundle: Bundle, oracle: Counting, observation: Observation, sampler: str, steps: int
) -> None:
    program = tiny_mode_bundle.new_program()
    settled = oracle.chunk(program, observation, seed=3, sampler=sampler, steps=steps)

    graphs = oracle.engine._graphs  # type: ignore[attr-defined]
    denoiser = graphs["denoise"].module
    network = denoiser.inner_model
    assert isinstance(network, ModeDiT)
    call = next(tiny_mode_bundle.new_program().infer(observation, None, SamplingOptions(0)))
    goal = graphs["language"].module(torch.from_numpy(call.inputs["tokens"]))
    images = [torch.from_numpy(observation.images[camera.name])[None] for camera in tiny_mode_bundle.spec.cameras]
    tokens = graphs["perceive"].module(goal, *images)

    def denoise(x: torch.Tensor, level: float) -> torch.Tensor:
        sigma = torch.tensor([level])
        return denoiser(x, sigma, tokens, goal, network.route(sigma, goal))

    spec = tiny_mode_bundle.spec.sampler
    assert spec is not None
    sigmas = SCHEDULES[spec.schedule](steps, NoiseLevels(spec.sigma_min, spec.sigma_max, spec.rho))
    rng = np.random.default_rng(3)

    def noise() -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((1, 4, 3), dtype=np.float32))

    routed = run(SAMPLERS[sampler](noise() * sigmas[0], sigmas, noise), denoise)
    np.testing.assert_allclose(settled, routed[0], atol=1e-6)


def test_guidance_asks_for_two_rows_and_changes_the_chunk(
    tiny_mode_bundle: Bundle, oracle: Counting, observation: Observation
) -> None:
    program = tiny_mode_bundle.new_program()
    plain = oracle.chunk(program, observation)
    guided = oracle.chunk(program, observation, guidance=2.0)
    goal_free = oracle.chunk(program, observation, guidance=0.0)
    assert oracle.rows == [1, 1, 1, 2, 2, 2, 1, 1, 1]
    assert np.abs(guided - plain).max() > 1e-4
    assert np.abs(goal_free - plain).max() > 1e-4


def test_the_levels_of_a_sampler_are_those_it_asks_about() -> None:
    sigmas = (1.0, 0.5, 0.1, 0.0)
    assert asked_levels("ddim", sigmas) == (1.0, 0.5, 0.1)
    assert len(asked_levels("heun", sigmas)) == 5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_levels_do_not_depend_on_what_a_sampler_is_answered(sampler: str) -> None:
    sigmas, rng, asked = (1.0, 0.5, 0.1, 0.0), np.random.default_rng(0), []

    def answer(x: np.ndarray, sigma: float) -> np.ndarray:
        asked.append(sigma)
        return 0.3 * x + 1

    run(SAMPLERS[sampler](rng.standard_normal(3), sigmas, lambda: rng.standard_normal(3)), answer)
    assert asked_levels(sampler, sigmas) == tuple(asked)


def test_routes_choose_as_many_experts_as_the_policy_says(tiny_mode_bundle: Bundle) -> None:
    config = tiny_mode_bundle.config.transformer
    routes = Routes(config, tiny_mode_bundle.assets.weights).of((80.0, 1.0, 0.001))
    assert routes.shape == (3, config.layers, config.experts)
    assert ((routes > 0).sum(-1) == config.top_k).all()
    np.testing.assert_allclose(routes.sum(-1), 1, atol=1e-6)


def test_an_instruction_of_too_many_tokens_is_the_requests_mistake(
    tiny_mode_bundle: Bundle, oracle: Counting, observation: Observation
) -> None:
    program = tiny_mode_bundle.new_program()
    with pytest.raises(UnsuitableGoal, match="has 42 tokens, the language model reads 24"):
        oracle.chunk(program, _told(observation, " ".join("0" * 40)))


def test_a_schedule_that_cannot_be_had_is_the_requests_mistake(
    tiny_mode_bundle: Bundle, observation: Observation
) -> None:
    sampler = tiny_mode_bundle.spec.sampler
    assert sampler is not None
    spec = replace(tiny_mode_bundle.spec, sampler=replace(sampler, schedule="iddpm", sigma_min=0.3, sigma_max=0.5))
    program = tiny_mode_bundle.family.make_program(spec, tiny_mode_bundle.config, tiny_mode_bundle.assets)
    with pytest.raises(UnsuitableOptions, match="fewer than 200 steps"):
        next(program.infer(observation, None, SamplingOptions(0, steps=200)))


def test_embedded_instructions_are_bounded_and_the_oldest_goes_first() -> None:
    goals = GoalMemory(capacity=2)
    for name in ("a", "b"):
        goals.put(name, np.zeros(1))
    assert goals.get("a") is not None
    goals.put("c", np.zeros(1))
    assert len(goals) == 2
    assert goals.get("b") is None
    assert goals.get("a") is not None


def test_goal_images_are_embedded_by_their_own_graph(tiny_goal_image_bundle: Bundle) -> None:
    oracle, program = Counting(tiny_goal_image_bundle), tiny_goal_image_bundle.new_program()
    observation = draw_observation(tiny_goal_image_bundle.spec, np.random.default_rng(0))
    assert isinstance(observation.goal, np.ndarray)
    one = oracle.chunk(program, observation)
    other = oracle.chunk(program, Observation(observation.images, None, 255 - observation.goal))
    assert oracle.calls == {"look_at_goal": 2, "perceive": 2, "denoise": 6}
    assert np.abs(one - other).max() > 1e-4
