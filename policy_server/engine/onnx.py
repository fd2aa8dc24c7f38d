"""The reference engine: ONNX Runtime in float32."""

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from policy_server.engine.base import Tensors


class OnnxEngine:
    """Runs ONNX graphs on the CPU."""

    name = "onnx"
    precision = "f32"

    def __init__(self, graphs: Mapping[str, Path], threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Spinning threads would steal the cores from the gateway's event loop and from neighbouring engines.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._sessions = {
            name: ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for name, path in graphs.items()
        }
        self._outputs = {name: [o.name for o in s.get_outputs()] for name, s in self._sessions.items()}

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        """Run one graph; see `Engine.run`."""
        results = self._sessions[graph].run(self._outputs[graph], dict(inputs))
        return dict(zip(self._outputs[graph], results, strict=True))

    def close(self) -> None:
        """Drop the sessions."""
        self._sessions.clear()
