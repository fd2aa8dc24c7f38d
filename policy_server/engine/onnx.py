"""The reference engine: ONNX Runtime in float32, on the CPU or on an NVIDIA GPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from policy_models.program import COTANGENT
from policy_server.engine.base import Tensors, runs_at_once
from policy_server.errors import DeviceNotFound, EngineNotInstalled

CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


class OnnxEngine:
    """Runs ONNX graphs on one device."""

    precision = "f32"

    def __init__(
        self,
        graphs: Mapping[str, Path],
        threads: int,
        *,
        gradients: Mapping[str, Path] = MappingProxyType({}),
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        """Load the graphs.

        Args:
            graphs: ONNX files by name.
            threads: Of the CPU; 0 lets the library choose.
            gradients: ONNX files of their gradients, by the same names.
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
        files = {**graphs, **{_gradient(name): path for name, path in gradients.items()}}
        self.differentiable = bool(gradients)
        self.most_runs = runs_at_once(threads) if device == "cpu" else 1
        self._sessions = {
            name: ort.InferenceSession(path, options, providers=providers) for name, path in files.items()
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

    def run_with_gradient(self, graph: str, inputs: Tensors, cotangent: np.ndarray) -> Tensors:
        """See `DifferentiableEngine.run_with_gradient`."""
        return self.run(_gradient(graph), {**inputs, COTANGENT: cotangent})

    def close(self) -> None:
        """Drop the sessions."""
        self._sessions.clear()


def _gradient(graph: str) -> str:
    return f"gradient of {graph}"


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
