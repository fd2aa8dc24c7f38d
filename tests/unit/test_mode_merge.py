"""MoDE with fewer experts: what merging may change, and what it may not."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from policy_models.mode import family
from policy_models.mode.config import TransformerConfig
from policy_models.mode.merge import (
    HiddenUnits,
    align,
    dominant_alone,
    group,
    merge,
    merge_group,
    schedule_levels,
    similarity,
    survey,
    training_levels,
)
from policy_models.mode.network import make_denoiser
from policy_models.mode.routing import Routes
from policy_models.spec import SamplerSpec, SamplingOptions
from policy_server.bundle import Bundle, load_bundle
from policy_server.cli import app
from policy_server.engine.base import ENGINES
from policy_server.engine.onnx import OnnxEngine
from policy_server.engine.openvino import OpenVinoEngine
from policy_server.engine.torch import load_weights
from policy_server.export.onnx import export_graphs
from policy_server.golden import draw_observation
from policy_server.runtime.sampling import drive

CONFIG = TransformerConfig(3, 4, 16, 2, 2, goal_width=8, token_width=8)
SAMPLER = SamplerSpec("ddim", "exponential", 10, 0.001, 80.0)
PAIRS = ((0, 1, 0, 1),) * 2  # experts 0 and 2 become one, and 1 and 3
PARTS = ("mlp.0.project.weight", "mlp.0.project.bias", "mlp.2.weight")

Weights = dict[str, Tensor]


@pytest.fixture
def weights() -> Weights:
    """Of a network with the configuration `CONFIG`, large enough that every expert shows."""
    generator = torch.Generator().manual_seed(0)
    network = make_denoiser(CONFIG)
    return {
        f"denoiser.{name}": 0.4 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in network.state_dict().items()
    }


@torch.no_grad()
def answer(config: TransformerConfig, weights: Mapping[str, Tensor]) -> Tensor:
    """Return what a network makes of 64 noisy chunks at as many noise levels, (64, H, A)."""
    denoiser = make_denoiser(config).eval()
    denoiser.load_state_dict({name.removeprefix("denoiser."): tensor for name, tensor in weights.items()})
    generator = torch.Generator().manual_seed(1)
    sigma = torch.tensor(training_levels(SAMPLER, 64))
    noisy, tokens, goal = (torch.randn(64, *shape, generator=generator) for shape in ((4, 3), (2, 8), (8,)))
    return denoiser(noisy, sigma, tokens, goal, denoiser.inner_model.route(sigma, goal))


def part(block: int, expert: int, name: str) -> str:
    return f"denoiser.inner_model.blocks.{block}.experts.expert_{expert}.{name}"


def read(weights: Weights, block: int, expert: int) -> list[Tensor]:
    return [weights[part(block, expert, name)] for name in PARTS]


def write(weights: Weights, block: int, expert: int, tensors: list[Tensor]) -> None:
    weights.update({part(block, expert, name): tensor for name, tensor in zip(PARTS, tensors, strict=True)})


def shuffled(tensors: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Return the same expert with its hidden units in another order, half of them with their signs turned."""
    project, bias, out = tensors
    order = torch.randperm(out.shape[1], generator=generator)
    sign = 1 - 2 * torch.randint(0, 2, (len(order),), generator=generator)
    (linear, gate), (linear_bias, gate_bias) = project.chunk(2), bias.chunk(2)
    return [
        torch.cat((linear[order] * sign[:, None], gate[order])),
        torch.cat((linear_bias[order] * sign, gate_bias[order])),
        out[:, order] * sign,
    ]


def test_merging_identical_experts_changes_nothing(weights: Weights) -> None:
    for block in range(2):
        for original, copy in ((0, 2), (1, 3)):
            write(weights, block, copy, [tensor.clone() for tensor in read(weights, block, original)])
    smaller, merged = merge(CONFIG, weights, PAIRS, np.random.default_rng(0).uniform(size=(2, 4)))
    assert smaller.kept == (2, 2)
    assert sum(t.numel() for t in merged.values()) < 0.7 * sum(t.numel() for t in weights.values())
    np.testing.assert_allclose(answer(smaller, merged), answer(CONFIG, weights), atol=1e-5)


def test_an_expert_is_recognised_with_its_hidden_units_in_another_order(weights: Weights) -> None:
    generator = torch.Generator().manual_seed(2)
    before = answer(CONFIG, weights)
    for block in range(2):
        for original, copy in ((0, 2), (1, 3)):
            write(weights, block, copy, read(weights, block, original))
    copied = answer(CONFIG, weights)
    for block in range(2):
        for copy in (2, 3):
            write(weights, block, copy, shuffled(read(weights, block, copy), generator))
    np.testing.assert_allclose(answer(CONFIG, weights), copied, atol=1e-5)

    smaller, merged = merge(CONFIG, weights, PAIRS, np.full((2, 4), 0.5))

    np.testing.assert_allclose(answer(smaller, merged), copied, atol=1e-5)
    assert (copied - before).abs().max() > 0.1


def test_aligning_an_expert_does_not_change_its_function_and_brings_it_nearer() -> None:
    generator = torch.Generator().manual_seed(3)
    expert, reference = (
        HiddenUnits(torch.randn(32, 17, generator=generator), torch.randn(32, 9, generator=generator)) for _ in range(2)
    )

    def function(units: HiddenUnits, z: Tensor) -> Tensor:
        linear, bias, out = units.linear.split((8, 1, 8), dim=1)
        gate = z @ units.gate[:, :8].T + units.gate[:, 8]
        return ((z @ linear.T + bias[:, 0]) * torch.nn.functional.silu(gate)) @ out

    def distance(units: HiddenUnits) -> float:
        return float((units.linear - reference.linear).square().sum() + (units.gate - reference.gate).square().sum())

    aligned = align(expert, reference)
    z = torch.randn(5, 8, generator=generator)
    np.testing.assert_allclose(function(aligned, z), function(expert, z), atol=1e-4)
    assert distance(aligned) < 0.8 * distance(expert)


def test_experts_are_averaged_by_how_much_they_are_used() -> None:
    one, other = (HiddenUnits(10 * torch.eye(8, 5) + shift, 10 * torch.eye(8, 3)) for shift in (0.0, 1.0))
    merged = merge_group([one, other], np.array([0.75, 0.25]))
    np.testing.assert_allclose(merged.linear, one.linear + 0.25, atol=1e-6)
    assert torch.equal(merge_group([one, other], np.array([0.0, 0.5])).linear, other.linear)
    assert torch.equal(merge_group([one, other], np.array([0.0, 0.0])).linear, one.linear)


def test_experts_are_alike_if_their_logits_rise_and_fall_together() -> None:
    logits = np.array([[1.0, 2.0, -3.0], [-1.0, -2.0, 3.0]])[:, None]
    alike = similarity([np.exp(logits + 5.0)])  # what is added to all of them makes no difference
    np.testing.assert_allclose(alike[0], [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-6)


def test_experts_gather_around_the_most_used() -> None:
    use = np.array([[0.2, 0.9, 0.1, 0.8], [0.5, 0.5, 0.5, 0.5]])
    alike = np.zeros((2, 4, 4))
    alike[0, 0, 3] = alike[0, 2, 1] = 1.0
    merged = group(use, alike, (2, 1))
    assert merged == ((1, 0, 0, 1), (0, 0, 0, 0))
    np.testing.assert_array_equal(dominant_alone(use, merged), [[0, 1, 0, 1], [1, 0, 0, 0]])


def test_the_survey_looks_at_the_schedule_and_at_the_levels_of_training(weights: Weights) -> None:
    routes = Routes(CONFIG, {name: tensor.numpy() for name, tensor in weights.items()})
    found = survey(routes, SAMPLER)
    levels = schedule_levels(SAMPLER)
    assert levels[0] == pytest.approx(80.0) and levels[-1] == pytest.approx(0.001) and len(levels) == 10
    np.testing.assert_allclose(found.on_schedule, routes.of(levels).mean(0))
    np.testing.assert_allclose(
        found.use, (found.on_schedule + routes.of(training_levels(SAMPLER, 512)).mean(0)) / 2, atol=1e-6
    )
    assert min(training_levels(SAMPLER, 100)) >= 0.001 and max(training_levels(SAMPLER, 100)) <= 80.0
    for shares in (found.on_schedule, found.use):
        np.testing.assert_allclose(shares.sum(1), 1.0, atol=1e-6)


@pytest.mark.parametrize("merged", [PAIRS, ((0, 0, 0, 0), (0, 1, 2, 1)), ((2, 0, 1, 0), (0, 0, 1, 1))])
def test_routes_of_a_merged_network_sum_to_1(weights: Weights, merged: tuple[tuple[int, ...], ...]) -> None:
    config, small = merge(CONFIG, weights, merged, np.ones((2, 4)))
    levels = training_levels(SAMPLER, 50)
    routes = Routes(config, {name: tensor.numpy() for name, tensor in small.items()}).of(levels)
    assert routes.shape == (50, 2, max(config.kept)) and routes.dtype == np.float32
    np.testing.assert_allclose(routes.sum(-1), 1.0, atol=1e-6)
    for block, kept in enumerate(config.kept):
        assert not routes[:, block, kept:].any()
    network = make_denoiser(config)
    network.load_state_dict({name.removeprefix("denoiser."): tensor for name, tensor in small.items()})
    with torch.no_grad():
        own = network.inner_model.route(torch.tensor(levels), torch.zeros(50, 8))
    np.testing.assert_allclose(routes, own, atol=1e-6)


@pytest.mark.parametrize(
    ("merged", "complaint"),
    [
        (((0, 1, 0, 1),), "each of 2 blocks"),
        (((0, 1, 0), (0, 1, 0)), "each of 4 experts"),
        (((0, 2, 0, 2), (0, 1, 0, 1)), "without a gap"),
        (((0, -1, 0, 1), (0, 1, 0, 1)), "without a gap"),
    ],
)
def test_a_configuration_that_names_no_possible_experts_is_refused(
    merged: tuple[tuple[int, ...], ...], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(CONFIG, merged=merged)


@pytest.fixture(scope="module")
def uneven(tiny_mode_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory):
    """The graph of a network whose blocks keep 1 and 3 experts: its definition in torch, and the exported file."""
    config, weights = tiny_mode_bundle.config, load_weights(tiny_mode_bundle.weights)
    transformer, small = merge(config.transformer, weights, ((0, 0, 0, 0), (0, 1, 2, 1)), np.ones((2, 4)))
    config = replace(config, transformer=transformer)
    graph = family.make_graphs(tiny_mode_bundle.spec, config, small)["denoise"]
    folder = tmp_path_factory.mktemp("graphs")
    export_graphs({"denoise": graph}, small, folder)
    return config, graph, folder / "denoise.onnx"


def test_the_graph_of_a_merged_network_holds_no_other_experts(uneven) -> None:
    _, _, path = uneven
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert sum(node.op_type == "If" for node in nodes) == 1 + 3


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_a_merged_graph_agrees_with_torch(uneven, engine: str, rows: int) -> None:
    config, graph, path = uneven
    graphs = {"denoise": path}
    running = OnnxEngine(graphs, 1) if engine == "onnx" else OpenVinoEngine(graphs, 1, "f32")
    draw = np.random.default_rng(4)
    route = draw.uniform(size=(rows, 2, max(config.transformer.kept))).astype(np.float32)
    route[:, 0, 1:] = 0.0
    inputs = {
        name: draw.uniform(0.1, 1.0, (rows, *tensor.shape[1:])).astype(np.float32)
        for name, tensor in graph.inputs.items()
    } | {"route": route}
    with torch.no_grad():
        wanted = graph.module(*(torch.from_numpy(inputs[name]) for name in graph.inputs))
    np.testing.assert_allclose(running.run("denoise", inputs)["denoised"], wanted, atol=1e-4, rtol=1e-4)
    running.close()


@pytest.fixture(scope="module")
def compressed(tiny_mode_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, str]:
    """What `compress --experts used` makes of the tiny bundle, and what it says."""
    output = tmp_path_factory.mktemp("compressed") / "smaller"
    done = CliRunner().invoke(app, ["compress", str(tiny_mode_bundle.path), "-o", str(output), "--samples", "3"])
    assert done.exit_code == 0, done.output
    return load_bundle(output), done.output


def test_experts_that_the_schedule_never_chooses_can_go_without_a_trace(
    tiny_mode_bundle: Bundle, compressed: tuple[Bundle, str]
) -> None:
    smaller, _ = compressed
    assert tiny_mode_bundle.config.transformer.kept == (4, 4)
    assert smaller.config.transformer.kept == (2, 2)
    draw = np.random.default_rng(5)
    engines = [ENGINES["onnx"].make(bundle, 1) for bundle in (tiny_mode_bundle, smaller)]
    for seed in range(4):
        observation = draw_observation(smaller.spec, draw)
        chunks = []
        for bundle, engine in zip((tiny_mode_bundle, smaller), engines, strict=True):
            program = bundle.new_program()
            dialogue = program.infer(observation, program.begin(), SamplingOptions(seed))
            chunks.append(drive(dialogue, engine).actions)
        np.testing.assert_allclose(chunks[1], chunks[0], atol=1e-7)


def test_the_command_says_what_was_won_and_what_was_lost(compressed: tuple[Bundle, str]) -> None:
    _, output = compressed
    lines = {line.split("  ")[0]: line.split()[-2:] for line in output.splitlines()}
    assert lines["experts in each block"] == ["4", "2"]
    for row in ("parameters, million", "weights, MB"):
        before, after = map(float, lines[row])
        assert after < before
    assert "0 % of their range on average, 0 % at most, from tiny-mode to smaller" in output


def test_the_new_bundle_says_where_it_comes_from(tiny_mode_bundle: Bundle, compressed: tuple[Bundle, str]) -> None:
    manifest = compressed[0].manifest
    origin = manifest.provenance["compressed_from"]
    assert (manifest.name, origin["name"], origin["version"]) == ("smaller", "tiny-mode", "1")
    assert origin["weights_sha256"] == tiny_mode_bundle.manifest.files["graphs/weights.safetensors"]
    assert (origin["experts_before"], origin["experts_kept_by_block"]) == (4, [2, 2])
    assert not manifest.results and manifest.tolerance == tiny_mode_bundle.manifest.tolerance


def test_the_new_bundle_passes_the_check(compressed: tuple[Bundle, str]) -> None:
    done = CliRunner().invoke(app, ["check", str(compressed[0].path)])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--experts", "0"], "can keep 1 to 3 of them, got 0"),
        (["--experts", "4"], "can keep 1 to 3 of them, got 4"),
        (["--experts", "many"], "expected a number"),
        (["--observations", "nowhere.npz"], "no .npz file"),
        (["--observations", "{demos}"], "expected uint8 (N, 32, 32, 3)"),
        (["--observations", "{half}"], "the cameras static, wrist"),
    ],
)
def test_what_cannot_be_done_is_said(
    tiny_mode_bundle: Bundle, tmp_path: Path, options: list[str], complaint: str
) -> None:
    static = np.zeros((2, 48, 64, 3), dtype=np.uint8)
    files = {"half": tmp_path / "half.npz", "demos": tmp_path / "demos.npz"}
    np.savez(files["half"], static=static)
    np.savez(files["demos"], static=static, wrist=static)
    arguments = [option.format(**files) for option in options]
    done = CliRunner().invoke(app, ["compress", str(tiny_mode_bundle.path), "-o", str(tmp_path / "new"), *arguments])
    assert done.exit_code == 2
    assert complaint in " ".join(done.output.split())
    assert not (tmp_path / "new").exists()


def test_only_single_experts_can_be_merged_and_nothing_is_overwritten(
    tiny_mode_bundle: Bundle, camera_bundle: Bundle, compressed: tuple[Bundle, str], tmp_path: Path
) -> None:
    for bundle, output, complaint in (
        (camera_bundle, tmp_path / "new", "camera is a hold bundle"),
        (compressed[0], tmp_path / "new", "merged already"),
        (tiny_mode_bundle, compressed[0].path, "exists already"),
    ):
        done = CliRunner().invoke(app, ["compress", str(bundle.path), "-o", str(output), "--experts", "2"])
        assert done.exit_code == 2
        assert complaint in " ".join(done.output.split())
