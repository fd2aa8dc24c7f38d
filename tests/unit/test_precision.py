"""Low precision in the graph: what eager torch computes, the exported graph computes, and it is near float32."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, load
from onnx.reference import ReferenceEvaluator
from torch import nn

from policy_models.precision import HalfLinear, InputRanges, QuantizedLinear, lowered
from policy_models.program import Graph
from policy_models.spec import Precision
from policy_server.bundle import Bundle
from policy_server.engine.onnx import OnnxEngine
from policy_server.errors import BundleInvalid
from policy_server.export.lowered import LoweredGraphs, lower_bundle, write_graphs
from policy_server.export.observations import read_observations
from policy_server.export.onnx import to_onnx
from policy_server.export.operators import check_operators
from policy_server.golden import GoldenCase

Record = Callable[..., Path]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Save observations of the tiny MoDE policy, with arrays of one's own instead of some: record(wrist=...)."""

    def save(**arrays: np.ndarray) -> Path:
        draw = np.random.default_rng(0)
        images = {
            "static": draw.integers(0, 256, (6, 48, 64, 3), dtype=np.uint8),
            "wrist": draw.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8),
        }
        np.savez(tmp_path / "recorded.npz", **{**images, **arrays})
        return tmp_path / "recorded.npz"

    return save


def _lower(bundle: Bundle, precision: Precision, record: Record) -> LoweredGraphs:
    return lower_bundle(bundle, precision, observations=record(), samples=4)


def test_a_graph_computes_what_torch_does_also_in_its_experts(
    tiny_mode_bundle: Bundle, record: Record, tmp_path: Path
) -> None:
    low = _lower(tiny_mode_bundle, "fp8", record)
    assert 0 < low.drift < 0.1
    assert low.moved is not None and 0 < low.moved[0] < low.moved[1] < 0.1
    path = write_graphs({"denoise": low.graphs["denoise"]}, tmp_path)["denoise"]
    check_operators([path])
    # An expert that no noise level of the schedule chose could not be calibrated, and has float16.
    assert {ir.DataType.FLOAT16, ir.DataType.FLOAT8E4M3FN} & _types_in_branches(path)
    inputs = {name: tensor.numpy() for name, tensor in low.graphs["denoise"].inputs.items()}
    got = OnnxEngine({"denoise": path}, 1).run("denoise", inputs)["denoised"]
    with torch.inference_mode():
        wanted = low.graphs["denoise"].exported(*low.graphs["denoise"].inputs.values()).numpy()
    # ONNX Runtime multiplies float16 in float32 on CPUs; a rounding that falls the other way is one step of 8 bits.
    np.testing.assert_allclose(got, wanted, atol=2e-2 * np.abs(wanted).max())


def test_every_graph_of_a_policy_answers_the_golden_case(
    tiny_mode_bundle: Bundle, record: Record, tmp_path: Path
) -> None:
    low = _lower(tiny_mode_bundle, "int8", record)
    paths = write_graphs(low.graphs, tmp_path)
    check_operators(paths.values())
    case = GoldenCase(tiny_mode_bundle.path / "golden.npz")
    assert case.drift(tiny_mode_bundle.new_program(), OnnxEngine(paths, 1)) < 0.1
    assert ir.DataType.INT8 in _types_in_branches(paths["denoise"]), "the experts must be in low precision too"
    images = {value.name: value for value in ir.load(paths["perceive"]).graph.inputs}
    assert images["image_static"].dtype == ir.DataType.UINT8, "robots' images go into graphs as they are"


def _types_in_branches(path: Path) -> set[ir.DataType | None]:
    branches = ir.load(path).graph.subgraphs()
    return {value.dtype for branch in branches for node in branch for value in node.inputs if value is not None}


def test_bfloat16_graphs_multiply_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(64, 96), nn.GELU()), torch.randn(2, 3, 64)
    low = lowered(module, "bf16")
    ir.save(to_onnx(Graph(low, {"x": x}, ("y",))), tmp_path / "g.onnx")
    model = load(tmp_path / "g.onnx")
    stored = {tensor.data_type for tensor in model.graph.initializer if tensor.dims == [64, 96]}
    assert stored == {TensorProto.BFLOAT16}
    (got,) = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(got, low(x).numpy(), atol=1e-2)
        assert 0 < (low(x) - module(x)).abs().max() < 2e-2


def _watched(module: nn.Module, x: torch.Tensor) -> InputRanges:
    ranges = InputRanges()
    with ranges.watch(module), torch.inference_mode():
        module(x)
    return ranges


@pytest.mark.parametrize(("precision", "worst"), [("int8", 0.03), ("fp8", 0.08)])
def test_eight_bits_are_near(precision: Precision, worst: float) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(64, 128)), torch.randn(256, 64)
    low = lowered(module, precision, _watched(module, x))
    with torch.inference_mode():
        wanted, got = module(x), low(x)
    assert 0 < float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()) < worst


def test_int8_cuts_rare_large_values_off_and_fp8_does_not() -> None:
    layer, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 100.0
    ranges = _watched(layer, x)
    assert ranges.cut("0", "fp8") == 100.0
    cut = ranges.cut("0", "int8")
    assert cut is not None and 2 < cut <= 100


def test_a_layer_that_was_never_reached_stays_in_sixteen_bits() -> None:
    module = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(4, 4)])
    ranges = InputRanges()
    with ranges.watch(module), torch.inference_mode():
        module[0](torch.randn(2, 64))
    kinds = [type(layer) for layer in next(lowered(module, "int8", ranges).children()).children()]
    assert kinds == [QuantizedLinear, HalfLinear, nn.Linear]


def test_float32_shares_every_weight(tiny_bundle: Bundle) -> None:
    module = nn.Sequential(nn.Linear(64, 64))
    assert next(lowered(module, "f32").parameters()) is next(module.parameters())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"wrist": np.zeros((6, 16, 32, 3), np.uint8)}, r"'wrist' is uint8 .*expected uint8 \(N, 32, 32, 3\)"),
        ({"wrist": np.zeros((5, 32, 32, 3), np.uint8)}, "a row for each observation"),
        ({"goal": np.zeros((6, 3), np.float32)}, "'goal' is float32 .*expected instructions"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(
    tiny_mode_bundle: Bundle, record: Record, arrays: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(BundleInvalid, match=message):
        read_observations(record(**arrays), tiny_mode_bundle.spec)


def test_recorded_instructions_are_used_and_missing_ones_drawn_from_the_examples(
    tiny_mode_bundle: Bundle, record: Record
) -> None:
    told = np.array(["open the door"] * 6)
    assert {o.goal for o in read_observations(record(goal=told), tiny_mode_bundle.spec)} == {"open the door"}
    drawn = {o.goal for o in read_observations(record(), tiny_mode_bundle.spec)}
    assert drawn <= set(tiny_mode_bundle.spec.goal.examples)


def test_states_and_goals_are_read_row_by_row(tiny_step_bundle: Bundle, tmp_path: Path) -> None:
    states, goals = np.arange(8.0).reshape(2, 4), np.ones((2, 1, 4))
    np.savez(tmp_path / "r.npz", state=states, goal=goals)
    observations = read_observations(tmp_path / "r.npz", tiny_step_bundle.spec)
    assert observations[1].state is not None and observations[1].state.tolist() == [4, 5, 6, 7]
    np.savez(tmp_path / "r.npz", state=states)
    assert [o.goal for o in read_observations(tmp_path / "r.npz", tiny_step_bundle.spec)] == [None, None]
    with pytest.raises(BundleInvalid, match="looks back on 3 observations, only 2 are recorded"):
        lower_bundle(tiny_step_bundle, "int8", observations=tmp_path / "r.npz", samples=4)
    np.savez(tmp_path / "r.npz", state=np.full((2, 4), np.nan))
    with pytest.raises(BundleInvalid, match=r"expected finite numbers \(N, 4\)"):
        read_observations(tmp_path / "r.npz", tiny_step_bundle.spec)
