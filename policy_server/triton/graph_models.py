"""An engine whose graphs are models of the same Triton server: TensorRT plans, or ONNX Runtime on a GPU."""

from collections.abc import Mapping

import triton_python_backend_utils as pb_utils

from policy_server.engine.base import Tensors
from policy_server.errors import EngineFailed


class GraphModels:
    """Asks the models `<policy>@<graph>`, of the same version as the policy's, through Triton itself."""

    name = "models"
    differentiable = False
    most_runs = 1

    def __init__(self, policy: str, version: str, settings: Mapping[str, str]) -> None:
        self.precision = settings["precision"]
        self._policy = policy
        self._version = int(version)
        self._settings = settings

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        """Run one graph; see `Engine.run`. Raises EngineFailed."""
        request = pb_utils.InferenceRequest(
            model_name=f"{self._policy}@{graph}",
            model_version=self._version,
            # A model with batches has no inputs of rank 1, so a number for each row is a row of one number.
            inputs=[pb_utils.Tensor(name, a if a.ndim > 1 else a[:, None]) for name, a in inputs.items()],
            requested_output_names=self._settings[f"outputs_{graph}"].split(","),
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise EngineFailed(f"graph {graph!r}: {response.error().message()}")
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def close(self) -> None:
        """Nothing to give back: the models are Triton's."""
