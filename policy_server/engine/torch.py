"""The oracle: the networks themselves, in eager torch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from policy_models.families import Family
from policy_models.program import DIFFERENTIATED, GRADIENT
from policy_models.spec import PolicySpec
from policy_server.engine.base import Tensors
from policy_server.weights import transposed_names


class TorchEngine:
    """Runs the modules that the graphs were exported from."""

    name = "torch"
    precision = "f32"
    differentiable = True
    most_runs = 1

    def __init__(self, family: Family, spec: PolicySpec, config: Any, weights: Path, threads: int) -> None:
        # torch keeps one thread pool per process; its barriers collapse next to a busy neighbour, so small is safe.
        if threads:
            torch.set_num_threads(threads)
        self._graphs = family.make_graphs(spec, config, load_weights(weights) if weights.exists() else {})
        for definition in self._graphs.values():
            if isinstance(definition.module, torch.nn.Module):  # gradients are wanted of inputs alone
                definition.module.requires_grad_(False)

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        """Run one graph; see `Engine.run`."""
        definition = self._graphs[graph]
        with torch.inference_mode():
            results = definition.module(*(torch.from_numpy(inputs[name]) for name in definition.inputs))
        results = (results,) if isinstance(results, torch.Tensor) else results
        return {name: value.numpy() for name, value in zip(definition.outputs, results, strict=True)}

    def run_with_gradient(self, graph: str, inputs: Tensors, cotangent: np.ndarray) -> Tensors:
        """See `DifferentiableEngine.run_with_gradient`."""
        definition = self._graphs[graph]
        tensors = {name: torch.from_numpy(inputs[name]) for name in definition.inputs}
        at = tensors[DIFFERENTIATED].requires_grad_()
        with torch.enable_grad():
            results = definition.module(*tensors.values())
        results = (results,) if isinstance(results, torch.Tensor) else results
        (gradient,) = torch.autograd.grad(results[0], at, torch.from_numpy(cotangent))
        outputs = dict(zip(definition.outputs, (result.detach().numpy() for result in results), strict=True))
        return {**outputs, GRADIENT: gradient.numpy()}

    def close(self) -> None:
        """Drop the modules."""
        self._graphs = {}


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a bundle's weights as torch has them."""
    with safe_open(path, framework="pt") as file:
        transposed = transposed_names(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name: tensor.T if name in transposed else tensor for name, tensor in tensors.items()}
