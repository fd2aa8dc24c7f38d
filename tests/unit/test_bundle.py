"""Bundles: written, read, and refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml

from policy_models.spec import Box, MotionLimits
from policy_server.bundle import MANIFEST, Bundle, digest, find_bundles, load_bundle
from policy_server.catalog import load_engine
from policy_server.errors import BundleCorrupt, BundleInvalid, EngineUnavailable, GoldenDrift
from policy_server.export.bundle import write_bundle


@pytest.fixture
def copy(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle that a test may spoil."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))


def _edit(path: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest, then publish it anew: digests are right, so only the content can be refused."""
    manifest = yaml.safe_load((path / MANIFEST).read_text())
    change(manifest)
    manifest["files"] = {name: digest(path / name) for name in manifest["files"] if (path / name).exists()}
    (path / MANIFEST).write_text(yaml.safe_dump(manifest))


def test_a_bundle_reads_as_it_was_written(tiny_bundle: Bundle) -> None:
    again = load_bundle(tiny_bundle.path)
    assert again.manifest == tiny_bundle.manifest
    assert again.spec.action.names == ("fx", "fy")
    assert again.config == tiny_bundle.config
    assert list(again.graphs()) == ["denoise"]


def test_limits_of_motion_are_read_from_the_manifest(copy: Path) -> None:
    box = {"names": ["fy"], "low": [-0.5], "high": [0.5]}
    _edit(copy, lambda m: m["spec"].update(motion={"velocity": [1.0, None], "workspace": box}))
    motion = load_bundle(copy).spec.motion
    assert motion == MotionLimits(velocity=(1.0, None), workspace=Box(("fy",), (-0.5,), (0.5,)))


def test_the_exported_graph_has_a_dynamic_batch_and_shares_its_weights_with_torch(tiny_bundle: Bundle) -> None:
    graph = onnx.load(tiny_bundle.graphs()["denoise"], load_external_data=False)
    onnx.checker.check_model(tiny_bundle.graphs()["denoise"])
    assert graph.opset_import[0].version == 20
    for value in (*graph.graph.input, *graph.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param, f"{value.name} has a fixed batch"
    outside = [tensor for tensor in graph.graph.initializer if tensor.external_data]
    assert outside
    assert {entry.value for t in outside for entry in t.external_data if entry.key == "location"} == {
        "weights.safetensors"
    }


@pytest.mark.parametrize("name", ["graphs/weights.safetensors", "graphs/denoise.onnx", "golden.npz", "normalizer.json"])
def test_one_changed_byte_is_found(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleCorrupt, match=name):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "reads bundle format 1, got 2"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("spec"), "spec: Field required"),
        (lambda m: m["spec"].update(horizon=0), "must be positive"),
        (lambda m: m["spec"]["action"].update(units=["N"]), "units has 1 entries for 2 names"),
        (lambda m: m["spec"].update(motion={"velocity": [1.0]}), "motion.velocity has 1 entries for 2 action names"),
        (lambda m: m["spec"].update(motion={"speed": [1.0, 1.0]}), "spec.motion.speed"),
        (lambda m: m["spec"].update(horizon=5), "horizon is 5, but the network has 4"),
        (lambda m: m["spec"]["sampler"].update(sampler="magic"), "sampler 'magic'"),
        (lambda m: m["spec"]["sampler"].update(sigma_min=2.0), "sigma_min"),
        (lambda m: m.update(family="nonesuch"), "no policy family 'nonesuch'; there are: beso"),
        (lambda m: m["config"].update(heads=3), "3 heads do not divide"),
        (lambda m: m["config"].update(colour="red"), "config: colour"),
    ],
)
def test_a_manifest_that_does_not_fit_says_where(copy: Path, change, message: str) -> None:
    _edit(copy, change)
    with pytest.raises(BundleInvalid, match=message):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_file_outside_the_bundle_is_never_opened(copy: Path, name: str) -> None:
    manifest = yaml.safe_load((copy / MANIFEST).read_text())
    manifest["files"][name] = "0" * 64
    (copy / MANIFEST).write_text(yaml.safe_dump(manifest))
    with pytest.raises(BundleInvalid, match="lies outside the bundle"):
        load_bundle(copy)


@pytest.mark.parametrize("text", ["[1, 2", "- a list", "!!python/object/apply:os.system ['true']", "\x00"])
def test_a_manifest_that_is_no_plain_map_is_refused(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(BundleInvalid):
        load_bundle(copy)


def test_an_engine_that_drifts_from_the_golden_case_is_refused_with_the_figure(copy: Path) -> None:
    golden = dict(np.load(copy / "golden.npz"))
    golden["actions"] = golden["actions"] + 0.01
    np.savez_compressed(copy / "golden.npz", **golden)
    _edit(copy, lambda m: None)
    with pytest.raises(GoldenDrift, match=r"by 5\.\d+e-03 of the action range, tolerated is 1\.00e-04") as caught:
        load_engine(load_bundle(copy), "onnx", 1)
    assert caught.value.drift == pytest.approx(0.005, rel=0.01)


def test_a_precision_without_a_tolerance_is_never_chosen(copy: Path) -> None:
    _edit(copy, lambda m: m["tolerance"].pop("bf16"))
    bundle = load_bundle(copy)
    assert load_engine(bundle, "auto", 1).engine.precision == "f32"
    with pytest.raises(GoldenDrift):
        load_engine(bundle, "openvino-bf16", 1)


def test_an_unknown_engine_is_named_beside_the_known_ones(tiny_bundle: Bundle) -> None:
    with pytest.raises(EngineUnavailable, match="no engine 'warp'; there are: auto, onnx, openvino"):
        load_engine(tiny_bundle, "warp", 1)


def test_a_golden_case_without_its_arrays_is_refused(copy: Path) -> None:
    np.savez(copy / "golden.npz", nothing=1)
    _edit(copy, lambda m: None)
    with pytest.raises(BundleInvalid, match=r"golden\.npz is not a golden case"):
        load_engine(load_bundle(copy), "onnx", 1)


def test_writing_never_replaces_a_folder_of_something_else(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(BundleInvalid, match="is not a bundle; nothing was written"):
        write_bundle(tmp_path, replace(tiny_bundle.manifest, files={}))
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


def test_bundles_are_found_in_a_folder_of_them(tiny_bundle: Bundle, camera_bundle: Bundle, tmp_path: Path) -> None:
    for bundle in (tiny_bundle, camera_bundle):
        shutil.copytree(bundle.path, tmp_path / bundle.name)
    assert [path.name for path in find_bundles([tmp_path])] == ["camera", "tiny"]
    assert find_bundles([tiny_bundle.path]) == (tiny_bundle.path,)
    with pytest.raises(BundleInvalid, match="is no bundle and holds none"):
        find_bundles([tmp_path / "nowhere"])
