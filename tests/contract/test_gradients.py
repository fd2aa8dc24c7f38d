"""Engines that differentiate: their gradients are torch's, and sharing a run changes nothing."""

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch

from policy_models.program import GRADIENT, GraphCall
from policy_models.spec import Continuation, SamplingOptions
from policy_server.bundle import Bundle, load_bundle
from policy_server.engine.base import ENGINES, Engine
from policy_server.engine.torch import load_weights
from policy_server.golden import GoldenCase, draw_observation
from policy_server.runtime.sampling import drive, drive_together
from tests.conftest import ZOO

DIFFERENTIABLE = ("onnx", "openvino", "torch")
FAMILIES = ("tiny", "maze", "mode")
# How far a chunk that shared its runs may be from the one that it would have been alone.
MOVED = {"onnx": 1e-6, "openvino": 0.0, "torch": 2e-6}


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Bundle) -> Mapping[str, Bundle]:
    # The gradient of a MoDE takes half a minute to export; this one was.
    return {"tiny": tiny_bundle, "maze": load_bundle(ZOO / "point-maze"), "mode": load_bundle(ZOO / "meta-world")}


@pytest.fixture(scope="module")
def questions(bundles: Mapping[str, Bundle]) -> Mapping[str, GraphCall]:
    """Some denoising of a chunk, by family."""
    asked = {}
    for name, bundle in bundles.items():
        engine = ENGINES["onnx"].make(bundle, 1)
        calls = GoldenCase(bundle.path / "golden.npz").calls(bundle.new_program(), engine)
        asked[name] = [call for call in calls if call.graph == "denoise"][1]
        engine.close()
    return asked


@pytest.fixture(params=DIFFERENTIABLE, scope="module")
def engines(request: pytest.FixtureRequest, bundles: Mapping[str, Bundle]) -> Iterator[Mapping[str, Engine]]:
    engines = {name: ENGINES[request.param].make(bundle, 1) for name, bundle in bundles.items()}
    yield engines
    for engine in engines.values():
        engine.close()


def rows_like(call: GraphCall, rows: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the inputs of a call with so many rows, each with its own noise, and a cotangent."""
    draw = np.random.default_rng(seed)
    inputs = {name: np.repeat(array[:1], rows, axis=0) for name, array in call.inputs.items()}
    noisy = inputs["noisy"]
    inputs["noisy"] = noisy + 0.3 * draw.standard_normal(noisy.shape, dtype=np.float32)
    return inputs, draw.standard_normal(noisy.shape, dtype=np.float32)


def autograd(bundle: Bundle, inputs: Mapping[str, np.ndarray], cotangent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What torch says of the network itself, in float64."""
    graph = bundle.family.make_graphs(bundle.spec, bundle.config, load_weights(bundle.weights))["denoise"]
    module = (graph.differentiated or graph.module).double()
    tensors = {
        name: torch.from_numpy(value).double() if value.dtype == np.float32 else torch.from_numpy(value)
        for name, value in inputs.items()
    }
    tensors["noisy"].requires_grad_()
    denoised = module(*(tensors[name] for name in graph.inputs))
    (gradient,) = torch.autograd.grad(denoised, tensors["noisy"], torch.from_numpy(cotangent).double())
    return denoised.detach().numpy(), gradient.numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_gradients_are_those_of_torch(engines, bundles, questions, family: str, rows: int) -> None:
    inputs, cotangent = rows_like(questions[family], rows)
    got = engines[family].run_with_gradient("denoise", inputs, cotangent)
    denoised, gradient = autograd(bundles[family], inputs, cotangent)
    for array, wanted in ((got["denoised"], denoised), (got[GRADIENT], gradient)):
        assert array.shape == wanted.shape
        assert array.dtype == np.float32
        assert np.abs(array - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_asking_for_a_gradient_does_not_change_the_answer(engines, questions, family: str) -> None:
    inputs, cotangent = rows_like(questions[family], 2)
    alone = engines[family].run("denoise", inputs)["denoised"]
    with_gradient = engines[family].run_with_gradient("denoise", inputs, cotangent)["denoised"]
    np.testing.assert_allclose(with_gradient, alone, atol=1e-5 * np.abs(alone).max())


def test_a_gradient_is_not_overwritten_by_the_next_one(engines, questions) -> None:
    first = engines["tiny"].run_with_gradient("denoise", *rows_like(questions["tiny"], 2, seed=1))
    kept = {name: array.copy() for name, array in first.items()}
    engines["tiny"].run_with_gradient("denoise", *rows_like(questions["tiny"], 2, seed=2))
    for name, array in kept.items():
        np.testing.assert_array_equal(first[name], array)


def test_inputs_and_cotangents_are_left_alone(engines, questions) -> None:
    inputs, cotangent = rows_like(questions["tiny"], 2)
    copies = {**{name: array.copy() for name, array in inputs.items()}, "cotangent": cotangent.copy()}
    engines["tiny"].run_with_gradient("denoise", inputs, cotangent)
    for name, array in {**inputs, "cotangent": cotangent}.items():
        np.testing.assert_array_equal(array, copies[name])


@pytest.mark.parametrize("engine", DIFFERENTIABLE)
def test_engines_say_that_they_differentiate(engine: str, tiny_bundle: Bundle) -> None:
    assert ENGINES[engine].make(tiny_bundle, 1).differentiable


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_an_engine_of_a_bundle_without_gradients_says_so(engine: str, camera_bundle: Bundle) -> None:
    assert not ENGINES[engine].make(camera_bundle, 1).differentiable


def test_an_engine_of_int8_weights_says_so(bundles) -> None:
    assert not ENGINES["openvino-int8"].make(bundles["mode"], 1).differentiable


def _asked(bundle: Bundle, *, gradients: bool) -> list:
    """Some robots' observations, each with its own options and its own chunk to go on from."""
    draw, spec = np.random.default_rng(8), bundle.spec
    width, ways = spec.action.width, []
    for seed, steps in enumerate((3, 3, 4, 2, 3)):
        plan = draw.uniform(-0.5, 0.5, (spec.horizon, width)).astype(np.float32)
        weights = np.linspace(1, 0, spec.horizon, dtype=np.float32)
        pull = Continuation(plan, weights, 10.0, gradients) if seed % 2 == 0 else None
        ways.append((draw_observation(spec, draw), SamplingOptions(seed, steps, continuation=pull)))
    return ways


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_that_share_runs_are_those_that_they_would_be_alone(engines, bundles, family, gradients: bool) -> None:
    bundle, engine = bundles[family], engines[family]
    program, asked = bundle.new_program(), _asked(bundle, gradients=gradients)
    alone = [drive(program.infer(seen, program.begin(), options), engine).actions for seen, options in asked]
    dialogues = [program.infer(seen, program.begin(), options) for seen, options in asked]
    together = drive_together(dialogues, engine, lambda place: True)
    moved = max(np.abs(got.actions - wanted).max() for got, wanted in zip(together, alone, strict=True))
    assert moved <= MOVED[engine.name]
