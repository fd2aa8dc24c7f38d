"""Exports a policy's torch graphs to ONNX with a dynamic batch."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from policy_models.program import Graph

# Higher than any batch that is served; torch.export wants a bound.
_MAX_BATCH = 1024


def export_graphs(graphs: Mapping[str, Graph], folder: Path) -> None:
    """Write `<name>.onnx` for every graph, opset 20, first axis of every tensor dynamic."""
    folder.mkdir(parents=True, exist_ok=True)
    # The exporter reports its stages and torchvision's absence at level WARNING.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for name, graph in graphs.items():
        batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
        with warnings.catch_warnings():
            # torch 2.13 calls deprecated parts of its own from inside the exporter.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _ByName(graph.exported or graph.module),
                kwargs={"inputs": dict(graph.inputs)},
                f=str(folder / f"{name}.onnx"),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_shapes={"inputs": {input_name: {0: batch} for input_name in graph.inputs}},
                opset_version=20,
                dynamo=True,
                external_data=False,
                verbose=False,
                optimize=True,
            )
        _forget_origin(folder / f"{name}.onnx")


def _forget_origin(path: Path) -> None:
    """Remove what the exporter notes about every node: stack traces with the paths of this machine."""
    model = onnx.load(path)
    graph = model.graph
    for described in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del described.metadata_props[:]
        described.doc_string = ""
    onnx.save(model, path)


class _ByName(torch.nn.Module):
    """Takes by name what the module takes in order: the exporter cannot describe variable positional arguments."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        return self.module(*inputs.values())
