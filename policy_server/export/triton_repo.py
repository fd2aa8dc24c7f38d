"""Writes bundles into a Triton model repository: a model for each policy, and for each graph where those are apart."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import serialize_byte_tensor

from policy_server import kserve
from policy_server.bundle import GRAPHS, MANIFEST, Bundle, load_bundle
from policy_server.errors import BundleInvalid
from policy_server.export.model_card import model_card
from policy_server.export.triton_config import Layout, entry_config, graph_config, graph_model, graph_ports, to_text
from policy_server.golden import GoldenCase
from policy_server.weights import FILE

CONFIG = "config.pbtxt"
_MODEL = '''\
"""Run by Triton's Python backend; what it does is in policy_server/triton/{module}.py."""

from policy_server.triton.{module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def export_policy(bundle: Bundle, output: Path, layout: Layout) -> tuple[Path, ...]:
    """Write one policy's models into the repository `output`, and return their folders.

    Versions of a policy lie beside each other, so that a server can go from one to the next.

    Args:
        bundle: The policy; its version must be a number.
        output: The repository; it may hold other policies, and other versions of this one.
        layout: How it is served.

    Raises:
        BundleInvalid: A version is no number, is in the repository with other content, or takes other tensors.
    """
    version = _version(bundle, output)
    graphs = bundle.graphs("int8" if layout.precision == "int8" and not layout.target.is_gpu else "")
    outputs = {name: [p.name for p in graph_ports(path)[1]] for name, path in graphs.items()} if layout.apart else {}
    config = entry_config(bundle, layout, outputs)
    _check_fits(output / bundle.name / CONFIG, config)
    for stale in output.glob(f"{bundle.name}@*") if not layout.apart else ():
        shutil.rmtree(stale)

    folder = output / bundle.name
    with _new_version(folder, version) as scratch:
        for name in (MANIFEST, *bundle.manifest.files):
            _copy(bundle.path / name, scratch / "bundle" / name)
        (scratch / "model.py").write_text(_MODEL.format(module="entry"), encoding="utf-8")
    _write_warm_up(folder / "warmup", bundle)
    (folder / CONFIG).write_text(to_text(config), encoding="utf-8")
    (folder / "README.md").write_text(model_card(bundle, layout), encoding="utf-8")
    apart = graphs.items() if layout.apart else ()
    return (folder, *(_export_graph(bundle, path, output, version, layout) for _, path in apart))


def _export_graph(bundle: Bundle, graph: Path, output: Path, version: int, layout: Layout) -> Path:
    folder = output / graph_model(bundle.name, graph.stem)
    with _new_version(folder, version) as scratch:
        if layout.plans is not None:
            _copy(layout.plans / f"{graph.stem}.plan", scratch / "model.plan")
        elif layout.target.is_gpu:
            _copy(graph, scratch / "model.onnx")
            # Beside the graph, which refers to it by this name; gigabytes, and the same for every graph.
            _link(output / bundle.name / str(version) / "bundle" / GRAPHS / FILE, scratch / FILE)
        else:
            (scratch / "model.py").write_text(_MODEL.format(module="graph"), encoding="utf-8")
    (folder / CONFIG).write_text(to_text(graph_config(bundle.name, graph, layout)), encoding="utf-8")
    return folder


def _version(bundle: Bundle, output: Path) -> int:
    text = bundle.manifest.version
    if not re.fullmatch(r"[\w.-]+", bundle.name):
        raise BundleInvalid(f"{bundle.name!r} cannot be a model's name, which has letters, digits, '_', '-' and '.'")
    if not (text.isdecimal() and int(text) > 0):
        raise BundleInvalid(f"{bundle.name!r} has version {text!r}, but Triton counts versions: 1, 2, 3, ...")
    there = output / bundle.name / text / "bundle"
    if there.exists() and load_bundle(there).digest != bundle.digest:
        raise BundleInvalid(
            f"version {text} of {bundle.name!r} is in {output} with other content; give the new bundle a higher "
            f"version in its policy.yaml, or remove {there.parent}"
        )
    return int(text)


def _check_fits(path: Path, config: pb.ModelConfig) -> None:
    """Raise BundleInvalid if a version that is there takes or gives other tensors: they share one configuration."""
    versions = [p.name for p in path.parent.glob("*") if p.name.isdecimal()]
    if not path.exists() or not versions:
        return
    there = text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig())
    for what in ("input", "output"):
        got, wanted = ({t.name: tuple(t.dims) for t in getattr(c, what)} for c in (config, there))
        if got != wanted:
            raise BundleInvalid(
                f"{config.name!r} would have the {what}s {got}, but {path.parent} has versions "
                f"{', '.join(versions)} with {wanted}; export it under another name, or remove {path.parent}"
            )


def _write_warm_up(folder: Path, bundle: Bundle) -> None:
    folder.mkdir(exist_ok=True)
    for name, array in kserve.pack_request(GoldenCase(bundle.path / "golden.npz").observation(), {}).items():
        content = serialize_byte_tensor(array).item() if array.dtype == object else array.tobytes()
        (folder / name).write_bytes(content)


@contextmanager
def _new_version(model: Path, version: int) -> Iterator[Path]:
    """Yield an empty folder that takes the place of a version once it is complete."""
    model.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model, prefix=".") as parent:
        scratch = Path(parent) / str(version)
        scratch.mkdir()
        yield scratch
        shutil.rmtree(model / str(version), ignore_errors=True)
        scratch.replace(model / str(version))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
