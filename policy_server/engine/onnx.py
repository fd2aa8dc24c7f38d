"""The reference engine: ONNX Runtime in float32, on the CPU or on a CUDA device."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort

from policy_server.engine.base import Tensors
from policy_server.errors import EngineNotInstalled, EngineUnavailable

_CUDA = "CUDAExecutionProvider"


class OnnxEngine:
    """Runs ONNX graphs."""

    precision = "f32"

    def __init__(self, graphs: Mapping[str, Path], threads: int, device: Literal["cpu", "cuda"] = "cpu") -> None:
        self.name = "onnx" if device == "cpu" else "onnx-cuda"
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Spinning threads would steal the cores from the gateway's event loop and from neighbouring engines.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"] if device == "cpu" else [_cuda()]
        self._sessions = {
            name: ort.InferenceSession(path, options, providers=providers) for name, path in graphs.items()
        }
        if device == "cuda" and any(_CUDA not in session.get_providers() for session in self._sessions.values()):
            raise EngineUnavailable("ONNX Runtime found no CUDA device that it can use, and fell back to the CPU")
        self._outputs = {name: [o.name for o in s.get_outputs()] for name, s in self._sessions.items()}

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        """Run one graph; see `Engine.run`."""
        results = self._sessions[graph].run(self._outputs[graph], dict(inputs))
        return dict(zip(self._outputs[graph], results, strict=True))

    def close(self) -> None:
        """Drop the sessions."""
        self._sessions.clear()


def _cuda() -> tuple[str, dict[str, Any]]:
    if _CUDA not in ort.get_available_providers():
        raise EngineNotInstalled(
            "this ONNX Runtime is for CPUs; for CUDA, pip install onnxruntime-gpu instead of onnxruntime"
        )
    return _CUDA, {"use_tf32": 0}  # TF32 keeps 10 bits of mantissa, and this engine says float32
