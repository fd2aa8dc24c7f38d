"""The reference engine: ONNX Runtime in float32, on the CPU or on an NVIDIA GPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort

from policy_server.engine.base import Tensors
from policy_server.errors import DeviceNotFound, EngineNotInstalled

CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


class OnnxEngine:
    """Runs ONNX graphs on one device."""

    precision = "f32"

    def __init__(self, graphs: Mapping[str, Path], threads: int, *, device: Literal["cpu", "cuda"] = "cpu") -> None:
        """Load the graphs.

        Args:
            graphs: ONNX files by name.
            threads: Of the CPU; 0 lets the library choose.
            device: What computes.

        Raises:
            EngineNotInstalled: ONNX Runtime was built without the device.
            DeviceNotFound: The device does not start.
        """
        self.name = "onnx" if device == "cpu" else "onnx-cuda"
        providers = [_CPU] if device == "cpu" else _cuda()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Spinning threads would steal the cores from the gateway's event loop and from neighbouring engines.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._sessions = {
            name: ort.InferenceSession(path, options, providers=providers) for name, path in graphs.items()
        }
        # A provider that does not start is left out with a warning, and the CPU computes instead.
        if device == "cuda" and not all(CUDA in session.get_providers() for session in self._sessions.values()):
            raise DeviceNotFound(
                f"engine {self.name!r}: ONNX Runtime {ort.__version__} could not start {CUDA}, and says why above; "
                "it needs an NVIDIA GPU with its driver, and the CUDA and cuDNN that it was built for"
            )
        for session in self._sessions.values():
            # Otherwise a provider that fails between two chunks is replaced by the CPU, and only a print says so.
            session.disable_fallback()
        self._outputs = {name: [o.name for o in s.get_outputs()] for name, s in self._sessions.items()}

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        """Run one graph; see `Engine.run`."""
        results = self._sessions[graph].run(self._outputs[graph], dict(inputs))
        return dict(zip(self._outputs[graph], results, strict=True))

    def close(self) -> None:
        """Drop the sessions."""
        self._sessions.clear()


def _cuda() -> Sequence[Any]:
    if CUDA not in ort.get_available_providers():
        raise EngineNotInstalled(
            f"engine 'onnx-cuda': this ONNX Runtime ({ort.__version__}) was built without {CUDA}; "
            "pip uninstall onnxruntime, then pip install 'robot-policy-server[onnx-cuda]'"
        )
    # Finds CUDA and cuDNN where pip has put them.
    ort.preload_dlls()
    # Left alone, products of float32 are rounded to TensorFloat-32, and every new batch size is searched for the
    # fastest convolution for seconds.
    return [(CUDA, {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}), _CPU]
