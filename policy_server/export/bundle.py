"""Writes a bundle: weights, graphs, normalizer, golden case, and the manifest over them all."""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from pydantic import TypeAdapter

from policy_models.families import family
from policy_models.normalizer import Normalizer
from policy_server.bundle import GRADIENT_SUFFIX, GRAPHS, MANIFEST, TOKENIZER, Bundle, Manifest, digest, load_bundle
from policy_server.engine.base import ENGINES
from policy_server.errors import BundleInvalid
from policy_server.golden import write_golden

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# The variant of a bundle that has int8 weights; it is written if the manifest tolerates it.
INT8 = "int8"

# Drift from the golden case that a bundle allows unless its maker knows better, as a fraction of the action range:
# float32 engines differ in rounding alone, bfloat16 keeps 8 bits of mantissa.
DEFAULT_TOLERANCE: Mapping[str, float] = {"f32": 1e-4, "bf16": 2e-2}


def write_bundle(
    path: Path,
    manifest: Manifest,
    *,
    normalizer: Normalizer | None = None,
    weights: "Mapping[str, Tensor] | None" = None,
    tokenizer: str | None = None,
    seed: int = 0,
    gradients: bool = True,
) -> Bundle:
    """Write a bundle that `load_bundle` accepts, and return it.

    Args:
        path: The folder to make; it must not exist, or be an older version of the same bundle.
        manifest: Everything but `files`, which is filled in here.
        normalizer: For families that scale states and actions.
        weights: Under the keys of the family's modules; None for a family without graphs.
        tokenizer: The text of a `tokenizer.json`, for policies that read instructions.
        seed: Of the golden observation and its chunk.
        gradients: Whether compiled engines shall be able to pull through the denoiser, for real-time chunking; takes
            longer to export.

    Raises:
        BundleInvalid: The folder holds something else, or the parts do not fit each other.
    """
    if path.exists() and any(path.iterdir()) and not (path / MANIFEST).exists():
        raise BundleInvalid(f"{path} exists and is not a bundle; nothing was written")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        folder = Path(scratch)
        if normalizer is not None:
            (folder / "normalizer.json").write_bytes(TypeAdapter(Normalizer).dump_json(normalizer, indent=1) + b"\n")
        if tokenizer is not None:
            (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        if weights is not None:
            _write_network(folder, manifest, weights, gradients=gradients)
        _write_manifest(folder, manifest)
        logger.info("answering the golden case in torch")
        bundle = load_bundle(folder)
        engine = ENGINES["onnx" if weights is None else "torch"].make(bundle, 1)
        write_golden(folder / "golden.npz", bundle.new_program(), engine, seed=seed, draw=np.random.default_rng(seed))
        _write_manifest(folder, manifest)
        path.mkdir(exist_ok=True)
        _replace_files(folder, path)
    return load_bundle(path)


def _write_network(folder: Path, manifest: Manifest, weights: "Mapping[str, Tensor]", *, gradients: bool) -> None:
    from policy_models.quantize import int8_weights
    from policy_server.export.gradient import gradient_of
    from policy_server.export.onnx import export_graphs

    policy_family = family(manifest.family)
    config: Any = TypeAdapter(policy_family.Config).validate_python(manifest.config)
    graphs = policy_family.make_graphs(manifest.spec, config, weights)
    wanted = {name: graph for name, graph in graphs.items() if gradients and graph.differentiated is not None}
    traced = {f"{name}{GRADIENT_SUFFIX}": gradient_of(graph) for name, graph in wanted.items()}
    export_graphs(graphs, weights, folder / GRAPHS, gradients=traced)
    if INT8 in manifest.tolerance:
        quantized = {name: replace(g, exported=int8_weights(g.exported or g.module)) for name, g in graphs.items()}
        tensors = {f"{name}.{key}": t for name, g in quantized.items() for key, t in g.exported.state_dict().items()}
        export_graphs(quantized, tensors, folder / GRAPHS / INT8)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    whole = replace(manifest, files={p.relative_to(folder).as_posix(): digest(p) for p in files})
    (folder / MANIFEST).write_text(
        yaml.safe_dump(_plain(asdict(whole)), sort_keys=False, default_flow_style=None, width=110), encoding="utf-8"
    )


def _replace_files(source: Path, target: Path) -> None:
    kept = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
    notes = {p.relative_to(target) for p in target.rglob("*.md")}
    for old in [p for p in target.rglob("*") if p.is_file() and p.relative_to(target) not in kept | notes]:
        old.unlink()
    for name in kept:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target / name)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item not in (None, (), {})}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
