"""MoDE's graphs on every engine: the same answers, from the chosen experts alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from policy_models.mode.assembly import ModeNetworks
from policy_models.mode.config import ModeConfig
from policy_models.spec import SamplingOptions
from policy_server.bundle import Bundle
from policy_server.engine.base import ENGINES, Engine
from policy_server.engine.onnx import OnnxEngine
from policy_server.engine.openvino import OpenVinoEngine
from policy_server.engine.torch import load_weights
from policy_server.export.onnx import export_graphs
from policy_server.golden import draw_observation
from policy_server.runtime.sampling import drive
from tests.contract.engines import make_engine, parameters

TOLERANCE = {"f32": 1e-5, "bf16": 5e-2, "int8": 5e-2}


@pytest.fixture(params=parameters(TOLERANCE))
def engine(request: pytest.FixtureRequest, tiny_mode_bundle: Bundle) -> Iterator[Engine]:
    engine = make_engine(request.param, tiny_mode_bundle)
    assert engine.name == request.param
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def oracle(tiny_mode_bundle: Bundle) -> Engine:
    return ENGINES["torch"].make(tiny_mode_bundle, 1)


def _denoise_inputs(config: ModeConfig, rows: int) -> dict[str, np.ndarray]:
    """Rows of different noise levels whose routes differ in experts and weights."""
    draw, shape = np.random.default_rng(0), config.transformer
    route = np.zeros((rows, shape.layers, shape.experts), dtype=np.float32)
    for row in route.reshape(-1, shape.experts):
        weight = draw.uniform(0.1, 0.9)
        row[draw.permutation(shape.experts)[:2]] = weight, 1 - weight
    return {
        "noisy": draw.standard_normal((rows, shape.horizon, shape.action_width), dtype=np.float32),
        "sigma": draw.uniform(0.05, 1.0, rows).astype(np.float32),
        "tokens": draw.standard_normal((rows, 2, shape.token_width), dtype=np.float32),
        "goal": draw.standard_normal((rows, shape.goal_width), dtype=np.float32),
        "route": route,
    }


def _perceive_inputs(config: ModeConfig, rows: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "goal": draw.standard_normal((rows, config.transformer.goal_width), dtype=np.float32),
        "image_static": draw.integers(0, 256, (rows, 48, 64, 3), dtype=np.uint8),
        "image_wrist": draw.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8),
    }


def _language_inputs(config: ModeConfig, rows: int) -> dict[str, np.ndarray]:
    assert config.text is not None
    tokens = np.random.default_rng(0).integers(1, config.text.vocabulary - 2, (rows, config.text.context))
    tokens[:, 5], tokens[:, 6:] = config.text.vocabulary - 1, 0
    return {"tokens": tokens}


INPUTS = {"denoise": _denoise_inputs, "perceive": _perceive_inputs, "language": _language_inputs}


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("graph", INPUTS)
def test_it_agrees_with_the_oracle(
    engine: Engine, oracle: Engine, tiny_mode_bundle: Bundle, graph: str, rows: int
) -> None:
    inputs = INPUTS[graph](tiny_mode_bundle.config, rows)
    got, wanted = engine.run(graph, inputs), oracle.run(graph, inputs)
    assert got.keys() == wanted.keys()
    for name in wanted:
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(got[name] / scale, wanted[name] / scale, atol=TOLERANCE[engine.precision])


def test_a_row_is_answered_the_same_whatever_noise_levels_share_its_batch(
    engine: Engine, tiny_mode_bundle: Bundle
) -> None:
    inputs = _denoise_inputs(tiny_mode_bundle.config, 6)
    together = engine.run("denoise", inputs)["denoised"]
    alone = [engine.run("denoise", {k: v[i : i + 1] for k, v in inputs.items()})["denoised"] for i in range(6)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=TOLERANCE[engine.precision])


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 3), ("heun", 5), ("dpmpp_2s_ancestral", 4), ("lms", 7)])
def test_a_whole_chunk_agrees_with_the_oracle(
    engine: Engine, oracle: Engine, tiny_mode_bundle: Bundle, sampler: str, steps: int, guidance: float
) -> None:
    program = tiny_mode_bundle.new_program()
    observation = draw_observation(program.spec, np.random.default_rng(3))
    options = SamplingOptions(seed=5, steps=steps, sampler=sampler, guidance=guidance)
    got = drive(program.infer(observation, program.begin(), options), engine).actions
    program = tiny_mode_bundle.new_program()  # the first one remembers the instruction as that engine embedded it
    wanted = drive(program.infer(observation, program.begin(), options), oracle).actions
    np.testing.assert_allclose(got, wanted, atol=10 * TOLERANCE[engine.precision])


def test_no_graph_holds_a_router(tiny_mode_bundle: Bundle) -> None:
    routers = {
        tuple(array.shape)
        for name, array in tiny_mode_bundle.assets.weights.items()
        if name.endswith("router.mlp.3.weight")
    }
    for path in tiny_mode_bundle.graphs().values():
        graph = onnx.load(path, load_external_data=False).graph
        shapes = {tuple(tensor.dims) for tensor in graph.initializer}
        assert routers
        assert not routers & (shapes | {shape[::-1] for shape in shapes})


@pytest.mark.parametrize("make", [OnnxEngine, OpenVinoEngine])
def test_an_expert_that_is_not_chosen_is_not_computed(
    tiny_mode_bundle: Bundle, tmp_path: Path, make: type[OnnxEngine] | type[OpenVinoEngine]
) -> None:
    weights = load_weights(tiny_mode_bundle.weights)
    poisoned = "denoiser.inner_model.blocks.1.experts.expert_2."
    # Were it computed, even a weight of 0 would leave NaN.
    weights = {k: torch.full_like(v, torch.nan) if k.startswith(poisoned) else v for k, v in weights.items()}
    graphs = tiny_mode_bundle.family.make_graphs(tiny_mode_bundle.spec, tiny_mode_bundle.config, weights)
    export_graphs({"denoise": graphs["denoise"]}, weights, tmp_path)
    arguments = (1, "f32") if make is OpenVinoEngine else (1,)
    engine = make({"denoise": tmp_path / "denoise.onnx"}, *arguments)
    inputs = _denoise_inputs(tiny_mode_bundle.config, 2)

    inputs["route"][:] = [0.5, 0.0, 0.0, 0.5]
    assert np.isfinite(engine.run("denoise", inputs)["denoised"]).all()
    inputs["route"][0, 1] = [0.5, 0.0, 0.5, 0.0]
    assert np.isnan(engine.run("denoise", inputs)["denoised"][0]).all()


def test_the_int8_variant_holds_a_quarter_of_the_bytes(tiny_mode_bundle: Bundle) -> None:
    config = tiny_mode_bundle.config
    networks = ModeNetworks(config, [camera.name for camera in tiny_mode_bundle.spec.cameras])
    matrices = sum(4 * p.numel() for p in networks.parameters() if p.ndim > 1 and p.numel() >= 4096)
    int8 = tiny_mode_bundle.graphs("int8")["denoise"].parent / "weights.safetensors"
    saved = tiny_mode_bundle.weights.stat().st_size - int8.stat().st_size
    assert saved > 0.5 * matrices
