"""The oracle: the networks themselves, in eager torch."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from policy_models.families import Family
from policy_server.engine.base import Tensors


class TorchEngine:
    """Runs the modules that the graphs were exported from."""

    name = "torch"
    precision = "f32"

    def __init__(self, family: Family, config: Any, weights: Path, threads: int) -> None:
        # torch keeps one thread pool per process; its barriers collapse next to a busy neighbour, so small is safe.
        if threads:
            torch.set_num_threads(threads)
        self._graphs = family.make_graphs(config, load_file(weights) if weights.exists() else {})

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        """Run one graph; see `Engine.run`."""
        definition = self._graphs[graph]
        with torch.inference_mode():
            results = definition.module(*(torch.from_numpy(inputs[name]) for name in definition.inputs))
        results = (results,) if isinstance(results, torch.Tensor) else results
        return {name: value.numpy() for name, value in zip(definition.outputs, results, strict=True)}

    def close(self) -> None:
        """Drop the modules."""
        self._graphs = {}
