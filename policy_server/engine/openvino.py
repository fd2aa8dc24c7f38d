"""The fast engine on most CPUs: OpenVINO, in float32, in bfloat16, or with int8 weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import openvino as ov

from policy_server.engine.base import Tensors
from policy_server.engine.mapped import give_back
from policy_server.weights import FILE


class OpenVinoEngine:
    """Runs ONNX graphs on the CPU in a stated precision."""

    def __init__(self, graphs: Mapping[str, Path], threads: int, precision: Literal["f32", "bf16", "int8"]) -> None:
        self.name = "openvino" if precision == "f32" else f"openvino-{precision}"
        self.precision: str = precision
        settings = {
            # Left alone, OpenVINO quietly computes in bfloat16 on CPUs that have it.
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
        }
        core = ov.Core()
        self._requests = {
            name: core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
            for name, path in graphs.items()
        }
        for folder in {path.parent for path in graphs.values()}:
            give_back(folder / FILE)
        self._outputs = {
            name: [(i, port.any_name) for i, port in enumerate(request.model_outputs)]
            for name, request in self._requests.items()
        }

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        """Run one graph; see `Engine.run`."""
        request = self._requests[graph]
        request.infer(dict(inputs), share_inputs=True)
        # The request's own buffers are overwritten by its next run.
        return {name: np.array(request.get_output_tensor(i).data) for i, name in self._outputs[graph]}

    def close(self) -> None:
        """Drop the compiled models."""
        self._requests.clear()
