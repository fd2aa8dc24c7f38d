"""DiVLA's program over its own graphs in torch: which it asks for what, and what becomes of reasonings."""

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from policy_models.divla.config import DivlaConfig, EyesConfig, LanguageConfig, ScaleDpConfig
from policy_models.divla.family import make_program
from policy_models.divla.network import DivlaNetworks
from policy_models.divla.tokenizer import learn_tokenizer
from policy_models.families import family
from policy_models.normalizer import Normalizer, Statistics
from policy_models.program import Assets, UnsuitableGoal
from policy_models.spec import (
    CameraSpec,
    GoalSpec,
    Observation,
    PolicySpec,
    Reasoning,
    ReasoningSpec,
    SamplerSpec,
    SamplingOptions,
    VectorSpec,
)
from policy_server.engine.torch import TorchEngine
from policy_server.runtime.sampling import answer, drive_together

MOST = 16
CONFIG = DivlaConfig(
    ScaleDpConfig(1, 32, 2),
    state_width=4,
    action_width=3,
    horizon=8,
    eyes=EyesConfig(layers=1, width=32, heads=2),
    language=LanguageConfig(320, 32, 2, 2, 1, 64, rope_sections=(2, 3, 3), context=128),
    reasoning_tokens=MOST,
    system="Sort.",
)
SPEC = PolicySpec(
    action=VectorSpec(("x", "y", "z"), ("m", "m", "m")),
    state=VectorSpec(("a", "b", "c", "d"), ("rad",) * 4),
    cameras=(CameraSpec("left", 56, 56), CameraSpec("right", 56, 56)),
    goal=GoalSpec("text"),
    horizon=8,
    step_s=0.1,
    sampler=SamplerSpec("ddim_clipped", "squaredcos", 3, sigma_min=0.01, sigma_max=100.0),
    reasoning=ReasoningSpec(tokens=MOST),
)
NORMALIZER = Normalizer(
    Statistics((0.0,) * 4, (1.0,) * 4, (-1.0,) * 4, (1.0,) * 4),
    Statistics((0.0,) * 3, (1.0,) * 3, (-2.0,) * 3, (2.0,) * 3),
)
DENOISING = ["denoise"] * 3


def letters() -> str:
    return learn_tokenizer(["put the red cube into the binNext action:"], 320)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    torch.manual_seed(0)
    networks = DivlaNetworks(CONFIG)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # large enough for words and features that differ
        for weight in networks.parameters():
            if weight.ndim > 1:
                weight.copy_(1.5 * torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
    path = tmp_path_factory.mktemp("divla") / "weights.safetensors"
    save_file({name: value for name, value in networks.state_dict().items() if "lm_head" not in name}, path)
    return TorchEngine(family("divla"), SPEC, CONFIG, path, 1)


@pytest.fixture
def program():
    return make_program(SPEC, CONFIG, Assets(NORMALIZER, letters()))


def seen(seed: int = 0, goal: str = "put it there") -> Observation:
    rng = np.random.default_rng(seed)
    images = {camera.name: rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for camera in SPEC.cameras}
    return Observation(images, rng.standard_normal(4).astype(np.float32), goal)


def drive(dialogue, engine):
    """Return what came of a dialogue, the graphs that it asked, and what it said on the way."""
    asked, said = [], []
    try:
        call = next(dialogue)
        while True:
            asked.append(call.graph)
            if call.said:
                said.append(call.said)
            call = dialogue.send(answer(call, engine))
    except StopIteration as finished:
        return finished.value, asked, said


def later() -> float:
    return time.monotonic() + 60.0


def act(program, engine, observation: Observation, reasoning: Reasoning | None):
    return drive(program.infer(observation, {}, SamplingOptions(7, reasoning=reasoning)), engine)


def test_left_alone_it_reasons_first_and_acts_on_that(program, engine) -> None:
    outcome, asked, _ = act(program, engine, seen(), None)
    assert asked == ["see", "read", *["speak"] * (MOST - 1), "weigh", "inject", *DENOISING]
    assert outcome.actions.shape == (8, 3)
    assert np.abs(outcome.actions).max() <= 2.0, "within what actions are normalised by"
    assert outcome.reasoning.ended == "tokens"


def test_to_reason_and_to_act_apart_is_the_same_and_reads_nothing_twice(program, engine) -> None:
    observation = seen()
    together, _, _ = act(program, engine, observation, None)
    thought, asked, _ = drive(program.reason(observation, until_s=later()), engine)
    assert asked == ["see", "read", *["speak"] * (MOST - 1), "weigh"]
    apart, asked, _ = act(program, engine, observation, thought)
    assert asked == ["inject", *DENOISING]
    assert apart.actions.tobytes() == together.actions.tobytes()


def test_a_reasoning_about_an_earlier_observation_is_injected_into_what_is_seen_now(program, engine) -> None:
    thought, _, _ = drive(program.reason(seen(0), until_s=later()), engine)
    now, asked, _ = act(program, engine, seen(1), thought)
    assert asked == ["see", "read", "inject", *DENOISING]
    assert not np.allclose(now.actions, act(program, engine, seen(0), thought)[0].actions, atol=1e-3)


def test_without_reasoning_nothing_is_injected(program, engine) -> None:
    outcome, asked, _ = act(program, engine, seen(), Reasoning())
    assert asked == ["see", "read", *DENOISING]
    assert not np.allclose(outcome.actions, act(program, engine, seen(), None)[0].actions, atol=1e-3)


def test_another_reasoning_moves_the_actions(program, engine) -> None:
    chunks = []
    for text in ("put the cube", "the bin"):
        thought, asked, _ = drive(program.hear(seen(), text), engine)
        assert asked == ["see", "read", "hear"]
        assert (thought.text, thought.ended) == (text, "given")
        chunks.append(act(program, engine, seen(), thought)[0].actions)
    assert not np.allclose(*chunks, atol=1e-3)


def test_what_is_said_grows_from_call_to_call(program, engine) -> None:
    thought, _, said = drive(program.reason(seen(), until_s=later()), engine)
    assert said == sorted(set(said), key=len), "each is longer than the one before"
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(said))
    assert not said or thought.text.startswith(said[-1].strip())


def test_a_reasoning_that_has_no_time_left_ends_with_what_it_has(program, engine) -> None:
    thought, asked, _ = drive(program.reason(seen(), until_s=time.monotonic() - 1.0), engine)
    assert asked == ["see", "read"]
    assert (thought.ended, thought.features) == ("time", None)
    assert act(program, engine, seen(), thought)[1] == ["see", "read", *DENOISING]


def test_a_question_is_answered_without_anything_for_the_head(program, engine) -> None:
    answered, asked, _ = drive(program.reason(seen(), until_s=later(), question="what is there"), engine)
    assert set(asked) == {"see", "read", "speak"}
    assert answered.features is None


def test_robots_with_other_instructions_share_runs_word_by_word(program, engine) -> None:
    observations = [seen(i, goal) for i, goal in enumerate(("put", "put the red cube into the bin", "the bin"))]

    def dialogues():
        return [program.infer(o, {}, SamplingOptions(i)) for i, o in enumerate(observations)]

    together = drive_together(dialogues(), engine, lambda _: True)
    for dialogue, shared in zip(dialogues(), together, strict=True):
        alone, _, _ = drive(dialogue, engine)
        assert alone.reasoning.text == shared.reasoning.text
        np.testing.assert_allclose(alone.actions, shared.actions, atol=2e-3)


def test_an_instruction_that_overflows_the_context_is_refused_with_both_numbers(program) -> None:
    with pytest.raises(UnsuitableGoal, match=r"has \d+ tokens; a context of 128 has room for \d+"):
        next(program.infer(seen(goal="xyz " * 80), {}, SamplingOptions(0)))


def test_words_that_are_longer_than_a_reasoning_are_refused_with_both_numbers(program) -> None:
    with pytest.raises(UnsuitableGoal, match=rf"the reasoning has \d+ tokens, there may be {MOST - 1}"):
        next(program.hear(seen(), "xyzzy " * 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reasoning": None}, "needs a sampler, reasoning"),
        ({"goal": GoalSpec()}, "a goal of kind 'text'"),
        ({"goal": GoalSpec("text", required=False)}, "goal.required must be true"),
        ({"cameras": ()}, "images of one size"),
        ({"cameras": (CameraSpec("left", 56, 56), CameraSpec("right", 84, 56))}, "images of one size"),
        ({"horizon": 9}, "horizon is 9, but the network has 8"),
        ({"window": 2}, "window is 2"),
        ({"sampler": replace(SPEC.sampler, sampler="magic")}, "there are the samplers"),
        ({"reasoning": ReasoningSpec(tokens=MOST + 1)}, "17 tokens, but the network has 16"),
    ],
)
def test_a_bundle_whose_parts_do_not_fit_is_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_program(replace(SPEC, **change), CONFIG, Assets(NORMALIZER, letters()))


def test_a_bundle_without_tokenizer_or_statistics_is_refused() -> None:
    for assets in (Assets(NORMALIZER), Assets(None, letters())):
        with pytest.raises(ValueError, match="tokenizer.json and a normalizer.json"):
            make_program(SPEC, CONFIG, assets)
