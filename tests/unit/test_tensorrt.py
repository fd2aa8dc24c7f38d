"""TensorRT as far as it goes without TensorRT: graphs, operators, profiles, cache keys, plans as files, refusals."""

import ast
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import typer
from onnx import TensorProto, helper
from typer.testing import CliRunner

from policy_server.bundle import Bundle, digest
from policy_server.errors import BundleInvalid, UnsupportedGraph
from policy_server.export.build_report import BuildReport, GraphReport, write_report
from policy_server.export.lowered import lower_bundle, write_graphs
from policy_server.export.operators import check_operators
from policy_server.export.plans import (
    FORMAT,
    Batch,
    BuildOptions,
    Machine,
    Plans,
    cache_key,
    plan_path,
    profile,
    read_plans,
    write_plans,
)
from policy_server.tensorrt_cli import export_tensorrt
from tests.conftest import REPOSITORY, ZOO

MACHINE = Machine("10.13.3.9", "NVIDIA L4", "8.9")
OPTIONS = BuildOptions("f16", Batch(1, 1, 16))

app = typer.Typer()
app.command()(export_tensorrt)


def _invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


# Operators


@pytest.mark.parametrize("graph", sorted(ZOO.glob("*/graphs/*.onnx")), ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_graphs_of_the_zoo_need_no_operator_that_tensorrt_lacks(graph: Path) -> None:
    if graph.stem == "perceive":
        # TensorRT takes uint8 as input and casts it, no more; graphs that are exported for it cast first.
        with pytest.raises(UnsupportedGraph, match=r"'perceive'.*Transpose has 'image_static' of type UINT8"):
            check_operators([graph])
    else:
        check_operators([graph])


def test_int8_weights_of_a_bundle_are_not_for_tensorrt() -> None:
    with pytest.raises(UnsupportedGraph, match="operator Cast has .* of type INT8"):
        check_operators([ZOO / "meta-world" / "graphs" / "int8" / "language.onnx"])


def test_an_unsupported_operator_in_a_branch_is_named(tmp_path: Path) -> None:
    number = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])
    then, other = (
        helper.make_graph([helper.make_node(op, ["x"], [out], op)], op, [], [_like(number, out)])
        for op, out in (("Unique", "a"), ("Identity", "b"))
    )
    choice = helper.make_node("If", ["c"], ["y"], "choice", then_branch=then, else_branch=other)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph([choice], "g", [number, condition], [_like(number, "y")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "odd.onnx")
    with pytest.raises(UnsupportedGraph, match="graph 'odd': node 'Unique': operator Unique .* is not supported"):
        check_operators([tmp_path / "odd.onnx"])


def _like(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copied = onnx.ValueInfoProto()
    copied.CopyFrom(value)
    copied.name = name
    return copied


# Profiles and keys


@pytest.fixture(scope="module")
def graph(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    low = lower_bundle(tiny_bundle, "f32", observations=None, samples=1)
    return write_graphs(low.graphs, tmp_path_factory.mktemp("graphs"))["denoise"]


def test_a_profile_varies_the_batch_alone(graph: Path) -> None:
    assert profile(graph, Batch(1, 2, 16)) == {
        "noisy": ((1, 4, 2), (2, 4, 2), (16, 4, 2)),
        "sigma": ((1,), (2,), (16,)),
        "states": ((1, 1, 4), (2, 1, 4), (16, 1, 4)),
        "goal": ((1, 1, 4), (2, 1, 4), (16, 1, 4)),
    }


def test_an_axis_without_a_length_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length"])
    made = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [_like(value, "y")])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "g.onnx")
    with pytest.raises(BundleInvalid, match="'x' of the graph 'g' .*only its first axis may vary"):
        profile(tmp_path / "g.onnx", Batch(1, 1, 2))


def test_there_is_room_for_the_two_rows_of_guidance(tiny_bundle: Bundle) -> None:
    assert Batch.of(tiny_bundle, robots=1, max_robots=8) == Batch(1, 1, 16)
    assert tiny_bundle.spec.sampler is not None
    spec = replace(tiny_bundle.spec, sampler=replace(tiny_bundle.spec.sampler, guidance=1.5))
    guided = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, spec=spec))
    assert Batch.of(guided, robots=2, max_robots=8) == Batch(1, 4, 16)


def test_an_export_can_be_repeated_to_the_byte(tiny_bundle: Bundle, graph: Path, tmp_path: Path) -> None:
    low = lower_bundle(tiny_bundle, "f32", observations=None, samples=1)
    again = write_graphs(low.graphs, tmp_path)["denoise"]
    for suffix in (".onnx", ".weights"):
        assert digest(again.with_suffix(suffix)) == digest(graph.with_suffix(suffix))


def test_a_plan_is_found_again_only_if_nothing_has_changed(graph: Path, tmp_path: Path) -> None:
    weights = graph.with_suffix(".weights")
    key = cache_key(graph, weights, OPTIONS, MACHINE)
    assert cache_key(graph, weights, OPTIONS, MACHINE) == key
    other = tmp_path / "other"
    other.write_bytes(weights.read_bytes()[:-1] + b"\1")
    changed = [
        cache_key(graph, other, OPTIONS, MACHINE),
        cache_key(other, weights, OPTIONS, MACHINE),
        *(
            cache_key(graph, weights, replace(OPTIONS, **change), MACHINE)
            for change in (
                {"precision": "bf16"},
                {"batch": Batch(1, 1, 32)},
                {"level": 5},
                {"workspace_bytes": 1 << 20},
                {"version_compatible": True},
            )
        ),
        *(
            cache_key(graph, weights, OPTIONS, replace(MACHINE, **{name: "other"}))
            for name in ("tensorrt", "gpu", "compute_capability")
        ),
    ]
    assert len({key, *changed}) == 1 + len(changed)


# Plans as files


@pytest.fixture
def plans(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A folder as a build leaves it; what is in the plan itself is TensorRT's affair."""
    plan_path(tmp_path, "denoise").write_bytes(b"a plan")
    described = Plans(
        FORMAT,
        tiny_bundle.name,
        tiny_bundle.digest,
        OPTIONS,
        1e-3,
        MACHINE,
        {"denoise": digest(plan_path(tmp_path, "denoise"))},
    )
    write_plans(tmp_path, described)
    return tmp_path


def test_plans_are_read_as_they_were_written(plans: Path, tiny_bundle: Bundle) -> None:
    read = read_plans(plans)
    assert (read.options, read.machine, list(read.sha256)) == (OPTIONS, MACHINE, ["denoise"])
    read.check(tiny_bundle)


def test_plans_of_another_bundle_are_refused(plans: Path, tiny_bundle: Bundle, tiny_step_bundle: Bundle) -> None:
    with pytest.raises(BundleInvalid, match="built from another bundle"):
        read_plans(plans).check(tiny_step_bundle)
    described = json.loads((plans / "plans.json").read_text())
    (plans / "plans.json").write_text(json.dumps(described | {"sha256": {}}))
    with pytest.raises(BundleInvalid, match="has the graphs denoise"):
        read_plans(plans).check(tiny_bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 1, got 2"),
        ({"speed": 9}, "speed: Unexpected keyword"),
        ({"sha256": {"../denoise": "0"}}, "no name of a graph"),
        ({"sha256": {"perceive": "0"}}, "cannot be read"),
        ({"sha256": {"denoise": "0"}}, "says 0..."),
    ],
)
def test_broken_plans_are_refused(plans: Path, change: dict[str, object], message: str) -> None:
    described = json.loads((plans / "plans.json").read_text())
    (plans / "plans.json").write_text(json.dumps(described | change))
    with pytest.raises(BundleInvalid, match=message):
        read_plans(plans)


def test_a_folder_without_plans_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalid, match="policy-server export tensorrt"):
        read_plans(tmp_path)


def test_the_report_names_the_slowest_layers_first(tmp_path: Path) -> None:
    graph = GraphReport(12.5, 3_000_000, 1_000_000, {"norm | scale": 0.01, "product": 0.4})
    write_report(
        tmp_path,
        BuildReport("tiny", "1", OPTIONS, MACHINE, 1e-4, 2e-3, 2e-4, (1e-3, 2e-2), 1.5, {"denoise": graph}),
    )
    page = (tmp_path / "report.md").read_text()
    assert "| denoise | 12.5 s | 3.0 MB | 1.0 MB | 2 | 0.410 ms |" in page
    assert "1.0e-03 on average, 2.0e-02 at most" in page
    assert page.index("| product | 0.4000 |") < page.index("| norm / scale | 0.0100 |")
    assert json.loads((tmp_path / "report.json").read_text())["graphs"]["denoise"]["layer_ms"]["product"] == 0.4


# The command


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_without_tensorrt_the_command_says_what_to_install(tiny_bundle: Bundle, tmp_path: Path) -> None:
    status, output = _invoke(tiny_bundle.path, "-o", tmp_path / "plans")
    assert status == 2
    assert "pip install 'robot-policy-server[tensorrt]'" in output
    assert not (tmp_path / "plans").exists()


def test_the_graphs_alone_need_no_tensorrt(tiny_bundle: Bundle, tmp_path: Path) -> None:
    status, output = _invoke(tiny_bundle.path, "-o", tmp_path, "--precision", "f32", "--graphs-only")
    assert status == 0, output
    assert "in ONNX Runtime; allowed is 1.0e-04" in output
    assert "every operator is one that TensorRT" in output
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {"denoise.onnx", "denoise.weights"}


def test_int8_is_not_calibrated_on_noise(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for precision in ("int8", "fp8"):
        status, output = _invoke(tiny_bundle.path, "-o", tmp_path, "--precision", precision, "--graphs-only")
        assert status == 2
        assert "must be calibrated on what tiny will see" in output
        assert "with the arrays state and goal" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "f64"], "'f64' is not one of"),
        (["--batch", "9", "--max-batch", "8"], "9 is more than --max-batch 8"),
        (["--graphs-only", "--tolerance", "0"], "misses the golden case"),
        (["--graphs-only", "--precision", "int8", "--observations", "nowhere.npz"], "no .npz file of observations"),
    ],
)
def test_what_cannot_be_is_refused(tiny_mode_bundle: Bundle, tmp_path: Path, options: list[str], message: str) -> None:
    status, output = _invoke(tiny_mode_bundle.path, "-o", tmp_path, *options)
    assert status == 2
    assert message in output
    assert not list(tmp_path.iterdir())


def test_a_policy_without_graphs_has_no_plans(camera_bundle: Bundle, tmp_path: Path) -> None:
    status, output = _invoke(camera_bundle.path, "-o", tmp_path, "--graphs-only")
    assert status == 2
    assert "camera has no graphs" in output


def test_only_its_own_files_and_the_doctor_import_tensorrt() -> None:
    importing = set()
    for path in REPOSITORY.glob("policy_server/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if "tensorrt" in names or (isinstance(node, ast.ImportFrom) and node.module == "tensorrt"):
                importing.add(path.relative_to(REPOSITORY).as_posix())
    own = {"policy_server/engine/tensorrt.py", "policy_server/export/tensorrt.py"}
    assert importing == own | {"policy_server/doctor/engines.py"}
