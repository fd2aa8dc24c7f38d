"""The DiVLA benchmark's yardstick computes what the server computes, and its rows say what was measured."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from websockets.frames import apply_mask

from benchmarks import divla_heads
from benchmarks.divla_acting import LATEST, draw_questions
from benchmarks.divla_batches import draw_word
from benchmarks.divla_bundles import SCALE_DP_L, TALKING, UNET, random_weights, shortened
from benchmarks.divla_contenders import ServedDivla
from benchmarks.divla_heads import draw_step
from benchmarks.divla_part import Part, join, row
from benchmarks.eager_divla import EagerDivla
from benchmarks.ratios import Ratio
from policy_client.codec import unpack
from policy_models.divla.config import DivlaConfig, EyesConfig, LanguageConfig, ScaleDpConfig
from policy_models.divla.denoiser import make_head
from policy_models.divla.tokenizer import learn_tokenizer
from policy_models.families import family
from policy_models.normalizer import Normalizer, Statistics
from policy_models.program import Assets
from policy_models.spec import CameraSpec, GoalSpec, PolicySpec, ReasoningSpec, SamplerSpec, VectorSpec
from policy_server.bundle import FORMAT, GRAPHS, MANIFEST, Bundle, Manifest
from policy_server.engine.torch import TorchEngine
from policy_server.golden import draw_observation
from policy_server.weights import FILE, StoredWeights

TOKENS = 6
CONFIG = DivlaConfig(
    ScaleDpConfig(2, 32, 4),
    state_width=3,
    action_width=4,
    horizon=8,
    eyes=EyesConfig(layers=1, width=32, heads=2),
    language=LanguageConfig(400, 96, 2, 4, 2, 128, rope_sections=(4, 4, 4), context=128),
    reasoning_tokens=TOKENS,
    system="Sort.",
)


def _vector(width: int) -> VectorSpec:
    return VectorSpec(tuple(map(str, range(width))), ("",) * width, (-1.0,) * width, (1.0,) * width)


SPEC = PolicySpec(
    action=_vector(4),
    state=_vector(3),
    cameras=(CameraSpec("left", 56, 84), CameraSpec("right", 56, 84)),
    goal=GoalSpec("text", examples=("put the red block into the bin",)),
    horizon=8,
    step_s=0.1,
    sampler=SamplerSpec("ddim_clipped", "squaredcos", 3, sigma_min=0.01, sigma_max=100.0),
    reasoning=ReasoningSpec(TOKENS),
)


class Noting(TorchEngine):
    """Keeps what the head was told last, and counts what ran."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ran: list[str] = []
        self.told = np.empty(0)

    def run(self, graph, inputs):
        self.ran.append(graph)
        if graph == "denoise":
            self.told = inputs["context"]
        return super().run(graph, inputs)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle without graphs: nothing is exported for torch."""
    folder = tmp_path_factory.mktemp("divla")
    (folder / GRAPHS).mkdir()
    tokenizer = learn_tokenizer(SPEC.goal.examples, 400)
    torch.manual_seed(0)
    weights = random_weights(CONFIG, tokenizer)
    for name, value in weights.items():
        if "reasoning_film" in name:  # fresh ones let no reasoning change an action
            torch.nn.init.normal_(value, std=0.1)
    save_file(weights, folder / GRAPHS / FILE)
    statistics = [Statistics((0.0,) * n, (1.0,) * n, (-1.0,) * n, (1.0,) * n) for n in (3, 4)]
    assets = Assets(Normalizer(*statistics), tokenizer, StoredWeights(folder / GRAPHS / FILE))
    manifest = Manifest(FORMAT, "tiny", "divla", "1", "", "Apache-2.0", SPEC, asdict(CONFIG))
    return Bundle(folder, manifest, family("divla"), CONFIG, assets)


@pytest.fixture
def engine(bundle: Bundle) -> Noting:
    return Noting(bundle.family, bundle.spec, bundle.config, bundle.weights, 1)


def test_eager_torch_says_and_does_what_the_program_does(bundle: Bundle, engine: Noting) -> None:
    served, eager = ServedDivla(bundle, engine), EagerDivla(bundle, 1)
    for seed in range(3):
        observation = draw_observation(SPEC, np.random.default_rng(seed))
        wanted, got = served.reason(observation), eager.reason(observation)
        assert wanted.reasoning.text, "no word can be compared"
        assert got.reasoning.text == wanted.reasoning.text
        acted = served.act(observation, wanted.reasoning, seed, again=False)
        np.testing.assert_allclose(got.reasoning.seen["context"], engine.told, atol=1e-4)
        np.testing.assert_allclose(eager.act(observation, got.reasoning, seed, again=False), acted, atol=1e-4)
        np.testing.assert_allclose(eager.chunk(observation, seed), acted, atol=1e-4)


@pytest.mark.parametrize("kind", [ServedDivla, EagerDivla])
def test_a_reasoning_of_random_weights_has_its_most_tokens(bundle: Bundle, engine: Noting, kind: type) -> None:
    contender = kind(bundle, engine if kind is ServedDivla else 1)
    said = contender.reason(draw_observation(SPEC, np.random.default_rng(7)))
    assert said.tokens == TOKENS - 1
    assert 0 < said.tokens_ms < said.whole_ms
    assert said.reasoning.ended == "tokens"


def test_what_was_read_is_read_again_only_where_it_is_asked_for(bundle: Bundle, engine: Noting) -> None:
    served = ServedDivla(bundle, engine)
    observation = draw_observation(SPEC, np.random.default_rng(0))
    reasoning = served.reason(observation).reasoning
    engine.ran.clear()
    once = served.act(observation, reasoning, 0, again=False)
    assert engine.ran == ["inject", "denoise", "denoise", "denoise"]
    engine.ran.clear()
    np.testing.assert_array_equal(served.act(observation, reasoning, 0, again=True), once)
    assert engine.ran == ["see", "read", "inject", "denoise", "denoise", "denoise"]


def test_heads_are_told_the_same_and_step_alike(bundle: Bundle, engine: Noting) -> None:
    served, eager, rounded = ServedDivla(bundle, engine), EagerDivla(bundle, 1), EagerDivla(bundle, 1, in_bfloat16=True)
    inputs = draw_step(bundle, np.random.default_rng(0), rows=3)
    wanted = served.denoise(inputs)
    np.testing.assert_allclose(eager.denoise(inputs), wanted, atol=1e-5)
    off = np.max(np.abs(rounded.denoise(inputs) - wanted)) / np.max(np.abs(wanted))
    assert 0 < off < divla_heads.ALLOWED["bf16"]
    observation, context = draw_observation(SPEC, np.random.default_rng(0)), inputs["context"][:1]
    engine.ran.clear()
    np.testing.assert_allclose(eager.sample(observation, context, 3), served.sample(observation, context, 3), atol=1e-4)
    assert engine.ran == ["denoise"] * 3, "a head was timed with something else"


def test_robots_that_share_a_run_have_rows_of_their_own(bundle: Bundle) -> None:
    draw = np.random.default_rng(0)
    like = {
        "position": np.zeros((1, 3, 1), np.int64),
        "cache": np.zeros((1, 2, 2, 2, 32, 24), np.float32),
        "mask": np.ones((1, 32), np.int64),
    }
    words, steps = draw_word(like, bundle, draw, 4), draw_step(bundle, draw, 4)
    assert {len(value) for value in (*words.values(), *steps.values())} == {4}
    assert len({row.tobytes() for row in words["cache"]}) == 4
    assert len(set(steps["sigma"].tolist())) == 4
    assert steps["noisy"].dtype == words["cache"].dtype == np.float32


def test_robots_that_act_keep_to_one_instruction() -> None:
    # A chunk that follows another instruction waits for a reasoning, and would be as late as that is long.
    spec = replace(SPEC, goal=GoalSpec("text", examples=("left", "right", "up", "down")))
    asked = [unpack(_payload(question.frame)) for question in draw_questions(spec, LATEST)]
    assert {message["prompt"] for message in asked} == {"left"}
    assert [message["options"]["reasoning"] for message in asked] == [{"mode": "latest", "every_s": 0}] * len(asked)
    assert len({message["state"].tobytes() for message in asked}) == len(asked)


def _payload(frame: bytes) -> bytes:
    """Unmask a long frame of a client."""
    length = {126: 4, 127: 10}[frame[1] & 0x7F]
    return apply_mask(frame[length + 4 :], frame[length : length + 4])


def test_a_shortened_bundle_is_the_same_but_for_the_length_of_its_reasoning(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "golden.npz").write_bytes(b"golden")
    manifest = {"spec": {"reasoning": {"tokens": 128, "budget_s": 60.0}, "horizon": 8}, "files": {"golden.npz": "1"}}
    (whole / MANIFEST).write_text(yaml.safe_dump(manifest))
    bundle = Bundle(whole, Manifest(FORMAT, "a", "divla", "1", "", "", SPEC), family("divla"), CONFIG, Assets())
    short = shortened(bundle, 8, tmp_path / "short")
    manifest["spec"]["reasoning"]["tokens"] = 8
    assert yaml.safe_load((short / MANIFEST).read_text()) == manifest
    assert (short / "golden.npz").read_bytes() == b"golden"


def test_a_row_has_a_99th_percentile_only_of_a_hundred_times() -> None:
    few, many = [[10.0, 20.0]] * 49 + [[10.0]], [[10.0, 20.0]] * 50
    assert row("who", "what", few)[3] == ""
    assert row("who", "what", many, count=3, compared="twice") == ("who", "what", "15.0", "20.0", "200", "twice")


def test_parts_are_joined_in_their_order() -> None:
    one, two = Part((("a",) * 6,), facts={"one": "1"}), Part((("b",) * 6,), facts={"two": "2"})
    assert join([one, two]).rows == (("a",) * 6, ("b",) * 6)
    assert list(join([one, two]).facts) == ["one", "two"]


@pytest.mark.parametrize(("value", "met"), [(1.99, False), (2.0, True)])
def test_a_head_must_be_twice_as_fast(value: float, met: bool) -> None:
    assert divla_heads.bar_of("float32", "the UNet", Ratio(value, 1.5, 2.5)).met is met


def test_the_heads_are_of_released_size() -> None:
    def millions(config: DivlaConfig) -> float:
        with torch.device("meta"):
            return sum(p.numel() for p in make_head(config).parameters()) / 1e6

    assert (SCALE_DP_L.language.width, UNET.language.width) == (1536, 1536)
    assert (int(millions(SCALE_DP_L)), SCALE_DP_L.horizon, UNET.horizon) == (462, 50, 16)
    assert TALKING.reasoning_tokens == 64
