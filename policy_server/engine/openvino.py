"""The fast engine on most CPUs: OpenVINO, in float32, in bfloat16, or with int8 weights."""

import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import openvino as ov
import openvino.opset13 as opset

from policy_models.program import COTANGENT
from policy_server.engine.base import Tensors, runs_at_once
from policy_server.engine.mapped import give_back
from policy_server.weights import FILE


class OpenVinoEngine:
    """Runs ONNX graphs on the CPU in a stated precision."""

    def __init__(
        self,
        graphs: Mapping[str, Path],
        threads: int,
        precision: Literal["f32", "bf16", "int8"],
        *,
        gradients: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self.name = "openvino" if precision == "f32" else f"openvino-{precision}"
        self.precision: str = precision
        self.most_runs = runs = runs_at_once(threads)
        settings = {
            # Left alone, OpenVINO quietly computes in bfloat16 on CPUs that have it.
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            # Requests of several threads at once need a stream each.
            **({"INFERENCE_NUM_THREADS": threads * runs, "NUM_STREAMS": runs} if threads else {}),
        }
        core = ov.Core()
        self.differentiable = bool(gradients)
        self._models = {
            **{name: core.compile_model(core.read_model(path), "CPU", settings) for name, path in graphs.items()},
            **{
                _gradient(name): core.compile_model(_untied(core.read_model(path)), "CPU", settings)
                for name, path in gradients.items()
            },
        }
        # A request holds the buffers of one run, so each thread has its own.
        self._own = threading.local()
        for folder in {path.parent for path in graphs.values()}:
            give_back(folder / FILE)
        self._outputs = {
            name: [(i, port.any_name) for i, port in enumerate(model.outputs)] for name, model in self._models.items()
        }

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        """Run one graph; see `Engine.run`."""
        requests: dict[str, ov.InferRequest] = self._own.__dict__
        if graph not in requests:
            requests[graph] = self._models[graph].create_infer_request()
        request = requests[graph]
        request.infer(dict(inputs), share_inputs=True)
        # The request's own buffers are overwritten by its next run.
        return {name: np.array(request.get_output_tensor(i).data) for i, name in self._outputs[graph]}

    def run_with_gradient(self, graph: str, inputs: Tensors, cotangent: np.ndarray) -> Tensors:
        """See `DifferentiableEngine.run_with_gradient`."""
        return self.run(_gradient(graph), {**inputs, COTANGENT: cotangent})

    def close(self) -> None:
        """Drop the compiled models."""
        self._models.clear()
        self._own = threading.local()


def _untied(model: ov.Model) -> ov.Model:
    """Let every transposed square matrix of a model be a matrix of its own.

    Where one square constant is multiplied both as it is and transposed, as in every gradient, OpenVINO 2026.4 uses it
    as it is for both, and nothing says so; it seems to keep packed weights by their address and shape.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Transpose":
            continue
        matrix = node.input_value(0).get_node()
        shape = tuple(matrix.get_output_partial_shape(0).to_shape()) if matrix.get_type_name() == "Constant" else ()
        if len(shape) == 2 and shape[0] == shape[1]:
            transposed = opset.constant(np.ascontiguousarray(matrix.data.T))
            node.output(0).replace(transposed.output(0))
    return model


def _gradient(graph: str) -> str:
    return f"gradient of {graph}"
