"""Exports a policy's torch graphs to ONNX with a dynamic batch, and makes them share one file of weights."""

import json
import logging
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset20 as op

import policy_models.precision  # noqa: F401  (registers the operators that are translated below)
from policy_models.program import Graph
from policy_server.weights import FILE, write_weights

logger = logging.getLogger(__name__)

# Higher than any batch that is served; torch.export wants a bound.
_MAX_BATCH, _MAX_LENGTH = 1024, 1 << 16
# Smaller constants stay inside the graph.
_SHARED_BYTES = 1024


def export_graphs(
    graphs: Mapping[str, Graph],
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    gradients: Mapping[str, Graph] = MappingProxyType({}),
) -> None:
    """Write `<name>.onnx` for every graph, and the weights that they refer to, into `folder`.

    Opset 20, first axis of every tensor dynamic, and what a graph's `lengths` name. A constant that is a stored tensor,
    or one turned round, is not written again but read from the weights.

    Args:
        graphs: By name; they decide which matrices are stored turned round.
        weights: By name.
        folder: Made if need be.
        gradients: More graphs, by name, which want some matrices both ways and take what there is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.numpy() for name, tensor in weights.items()}
    index = _index(stored)
    models = {}
    for name, graph in {**graphs, **gradients}.items():
        logger.info("exporting the graph %s", name)
        models[name] = to_onnx(graph)
    logger.info("matching constants with weights")
    matches = {name: _match(model, stored, index) for name, model in models.items()}

    every = [match for name in graphs for match in matches[name]]
    as_they_are = {match.tensor for match in every if not match.transposed}
    transposed = frozenset(match.tensor for match in every) - as_they_are
    path = folder / FILE
    logger.info("writing %s", FILE)
    write_weights(path, stored, transposed)
    places = _places(path)
    for name, model in models.items():
        for match in matches[name]:
            if match.transposed == (match.tensor in transposed):
                _refer(match.constant, *places[match.tensor])
        forget_origin(model)
        ir.save(model, folder / f"{name}.onnx")


@dataclass(frozen=True)
class _Match:
    constant: ir.Value
    tensor: str
    transposed: bool


def to_onnx(graph: Graph) -> ir.Model:
    """Return one graph in opset 20, its weights inside; first axes and `lengths` are dynamic."""
    # The exporter reports its stages and torchvision's absence at level WARNING, its helpers every node at INFO.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for helper in ("onnx_ir", "onnxscript"):
        logging.getLogger(helper).setLevel(logging.WARNING)
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    names = {length for axes in graph.lengths.values() for length in axes.values()}
    lengths = {name: torch.export.Dim(name, min=2, max=_MAX_LENGTH) for name in names}
    with warnings.catch_warnings(), torch.no_grad():
        # torch 2.13 calls deprecated parts of its own from inside the exporter.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _ByName(graph.exported or graph.module).eval(),
            kwargs={"inputs": dict(graph.inputs)},
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes={
                "inputs": {
                    name: {0: batch, **{axis: lengths[length] for axis, length in graph.lengths.get(name, {}).items()}}
                    for name in graph.inputs
                }
            },
            opset_version=20,
            dynamo=True,
            verbose=False,
            optimize=True,
            custom_translation_table=_TRANSLATIONS,
        )
    assert program is not None
    return program.model


def _index(stored: Mapping[str, np.ndarray]) -> dict[tuple[Any, ...], tuple[str, bool]]:
    """Return (name, whether transposed) by a signature: shape and a sample of the numbers."""
    index: dict[tuple[Any, ...], tuple[str, bool]] = {}
    for name, array in stored.items():
        if array.nbytes >= _SHARED_BYTES:
            index.setdefault(_signature(array), (name, False))
            if array.ndim == 2:
                index.setdefault(_signature(array.T), (name, True))
    return index


def _signature(array: np.ndarray) -> tuple[Any, ...]:
    # Drawn, not evenly spaced: those can be just the diagonal of a square matrix, which a transpose leaves as it is.
    sample = array.flat[np.random.default_rng(0).integers(0, array.size, 64)]
    return array.shape, array.dtype.str, sample.tobytes()


def _match(
    model: ir.Model, stored: Mapping[str, np.ndarray], index: Mapping[tuple[Any, ...], tuple[str, bool]]
) -> list[_Match]:
    found = []
    for constant in model.graph.initializers.values():
        assert constant.const_value is not None
        if constant.const_value.nbytes < _SHARED_BYTES:
            continue
        array = constant.const_value.numpy()
        name, transposed = index.get(_signature(array), ("", False))
        if name and np.array_equal(array, stored[name].T if transposed else stored[name]):
            found.append(_Match(constant, name, transposed))
    return found


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Return where each tensor of a safetensors file begins, and its length, in bytes."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name: (8 + length + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _refer(constant: ir.Value, offset: int, length: int) -> None:
    assert constant.const_value is not None and constant.name is not None
    constant.const_value = ir.ExternalTensor(
        FILE,
        offset,
        length,
        constant.const_value.dtype,
        shape=ir.Shape(constant.const_value.shape.numpy()),
        name=constant.name,
    )


def forget_origin(model: ir.Model) -> None:
    """Remove what the exporter notes about every node: stack traces with the paths of this machine."""
    for described in _described(model):
        described.metadata_props.clear()
        described.doc_string = None


def _described(model: ir.Model) -> Iterator[Any]:
    yield model
    for graph in (model.graph, *model.graph.subgraphs()):
        yield graph
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield node
            yield from node.outputs


def _quantize(x: Any, scale: Any, zero: Any) -> Any:
    return op.QuantizeLinear(x, scale, zero)


def _dequantize(x: Any, scale: Any, zero: Any) -> Any:
    return op.DequantizeLinear(x, scale, zero, axis=-1)


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.policy_models.quantize.default: _quantize,
    torch.ops.policy_models.dequantize.default: _dequantize,
}


class _ByName(torch.nn.Module):
    """Takes by name what the module takes in order: the exporter cannot describe variable positional arguments."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        return self.module(*inputs.values())
