"""Training a small DiVLA: batches are what was seen, ordered and thought; steps reduce both losses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from policy_models.divla.config import EyesConfig, UnetConfig
from policy_models.divla.dataset import Demonstrations, Sentences, statistics_of
from policy_models.divla.learner import Learner
from policy_models.divla.network import DivlaNetworks
from policy_models.divla.prompt import Template, Vocabulary
from policy_models.divla.train import Pace, make_config, make_spec, make_tokenizer, split, train
from policy_models.training import read_history
from policy_sim.sorting_camera import SIZE_PX
from policy_sim.sorting_demos import Settings, collect
from policy_sim.sorting_words import ORDERS, THINGS, THOUGHTS

SPEC = make_spec()
CONFIG = replace(
    make_config(),
    head=UnetConfig(widths=(16, 24, 32), groups=8, step_width=16),
    eyes=EyesConfig(layers=1, width=32, heads=2),
    language=replace(
        make_config().language, width=32, layers=1, heads=2, kv_heads=1, ffn_width=64, rope_sections=(2, 3, 3)
    ),
)


@pytest.fixture(scope="module")
def demos():
    return collect(3, Settings())


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(make_tokenizer())


@pytest.fixture(scope="module")
def sentences(demos, vocabulary) -> Sentences:
    return Sentences(Template(vocabulary, CONFIG, images=1, height=SIZE_PX, width=SIZE_PX), vocabulary, demos)


@pytest.fixture(scope="module")
def demonstrations(demos, sentences) -> Demonstrations:
    return Demonstrations(demos, sentences, statistics_of(demos, SPEC.action.low, SPEC.action.high))


def test_a_sequence_is_the_instruction_and_then_what_was_thought(demos, sentences, vocabulary) -> None:
    rows = np.array([0, len(demos["step"]) - 1])
    said = sentences.of(demos["instruction"][rows], demos["reasoning"][rows])
    for i, row in enumerate(rows):
        prompt = vocabulary.decode(said.tokens[i][said.prefix[i] & (said.places[i] < 0)].tolist())
        assert list(ORDERS)[demos["instruction"][row]] in prompt
        answer = said.tokens[i][said.answer[i]].tolist()
        assert vocabulary.decode(answer) == list(THOUGHTS)[demos["reasoning"][row]] + "Next action:"
        assert answer[-1] == vocabulary.special.end
        assert said.tokens[i][said.thought[i]].tolist() == answer[:-1], "the head is not told of the end"
    assert not (said.prefix & said.answer).any()


def test_another_reasoning_comes_with_the_actions_that_follow_it_and_is_not_learned(demos, demonstrations) -> None:
    rows = np.array([0, 1])
    batch = demonstrations.batch(rows, np.array([False, True]))
    assert batch.own.tolist() == [True, False]
    scale = np.array([0.8, 0.8, 1.0])
    np.testing.assert_allclose(batch.actions[0].numpy() * scale, demos["actions"][0], atol=1e-6)
    np.testing.assert_allclose(batch.actions[1].numpy() * scale, demos["other_actions"][1], atol=1e-6)
    assert (demos["other_reasoning"] != demos["reasoning"]).all()


def test_held_out_episodes_are_the_last_and_none_is_in_both(demos) -> None:
    seen, unseen = split(demos, 1)
    assert len(seen["image"]) + len(unseen["image"]) == len(demos["image"])
    np.testing.assert_array_equal(unseen["image"], demos["image"][demos["bounds"][-2] :])


def test_what_is_to_be_found_is_what_lies_on_the_table(demos, demonstrations) -> None:
    batch = demonstrations.batch(np.array([0]), np.zeros(1, bool))
    things = [thing for thing in demos["things"][0] if thing >= 0]
    assert sorted(things) == batch.present[0].nonzero()[:, 0].tolist()
    for thing, place in zip(things, demos["places"][0], strict=False):
        np.testing.assert_array_equal(batch.places[0, thing], place)


def test_steps_reduce_all_losses_and_the_averaged_weights_are_kept(demonstrations, tmp_path) -> None:
    torch.manual_seed(0)
    learner = Learner(DivlaNetworks(CONFIG), CONFIG, SIZE_PX, len(THINGS))
    batch, silent = demonstrations.batch(np.arange(8), np.zeros(8, bool)), torch.zeros(8, dtype=torch.bool)

    def losses() -> np.ndarray:
        with torch.no_grad():
            return learner(batch, silent, torch.Generator().manual_seed(1)).numpy()

    before = losses()
    checkpoint = tmp_path / "checkpoint.safetensors"
    train(
        learner,
        CONFIG,
        demonstrations,
        pace=Pace(32, None),
        seed=0,
        checkpoint=checkpoint,
        held_out=demonstrations,
        rate=3e-3,
    )
    after = losses()
    assert (after < (1.0, 0.8, 1.0) * before).all(), (before, after)
    DivlaNetworks(CONFIG).load(load_file(checkpoint))
    facts = read_history(checkpoint)[-1]
    assert facts["optimiser_steps"] == 24 and len(facts["held_out_losses"]) == 3, "the eyes had a quarter of the steps"
