"""The engines: which libraries are installed, and whether each really runs a graph."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from policy_server.doctor.finding import Finding
from policy_server.engine.base import ENGINES, Engine
from policy_server.errors import DeviceNotFound, EngineNotInstalled

# Multiplies x by a matrix whose rows are (1, 2) and (3, 4).
_GRAPHS = {"tiny": Path(__file__).parent / "tiny.onnx"}
_X = np.array([[1.0, 2.0], [-1.0, 0.5]], np.float32)
_Y = np.array([[7.0, 10.0], [0.5, 0.0]], np.float32)
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "torch", "tensorrt")
# These have no other use than to serve from a GPU, or to compare and export.
_OPTIONAL = {"onnx-cuda", "torch-cuda", "torch-cuda-bf16", "torch", "tensorrt"}

Run = Callable[[np.ndarray], np.ndarray]


def check_engine(name: str) -> Iterator[Finding]:
    """Run a tiny graph on one engine: of `ENGINES`, or TensorRT."""
    try:
        result = _RUNS[name](_X)
    except (ImportError, EngineNotInstalled) as error:
        extra = "tensorrt" if name == "tensorrt" else ENGINES[name].extra
        do = "" if name in _OPTIONAL else f"pip install 'robot-policy-server[{extra}]'"
        # Some of these errors say what to do as well, after a semicolon.
        why = _line(error).partition(";")[0]
        yield Finding("engines", "note", f"{name}: not installed ({why.removeprefix(f'engine {name!r}: ')})", do)
    except DeviceNotFound:
        yield Finding("engines", "note", f"{name}: {installed()} is there, but no NVIDIA GPU that it can use")
    except Exception as error:  # each library has its own classes
        yield Finding(
            "engines",
            "problem",
            f"{name}: fails on a tiny graph: {_line(error)}",
            "install its library anew, or another version of it; until then serve with another --engine",
        )
    else:
        yield _judge(name, result)


def check_choice(running: Sequence[str], triton: str) -> Iterator[Finding]:
    """Say so if none of the engines that run is one that "auto" may choose.

    Args:
        running: The engines that ran the tiny graph.
        triton: The address of a Triton server, whose gateway needs no engine of its own; empty if there is none.
    """
    automatic = [name for name, choice in ENGINES.items() if choice.automatic]
    if not set(running) & set(automatic):
        yield Finding(
            "engines",
            "note" if triton else "problem",
            f"none of {', '.join(automatic)} runs here: policies can only be served from Triton (--engine triton)",
            "pip install 'robot-policy-server[onnx,openvino]'",
        )


def _judge(name: str, result: np.ndarray) -> Finding:
    drift = float(np.max(np.abs(result - _Y)))
    if not drift <= 1e-3:  # small integers are exact in every precision, so this is not rounding
        return Finding(
            "engines",
            "problem",
            f"{name}: computes wrongly: a tiny graph is off by {drift:.2g}",
            "try another version of its library, and do not serve with this one",
        )
    return Finding("engines", "ok", f"{name}: runs ({installed()})")


def installed() -> str:
    """Return which libraries of engines this process has loaded, with versions."""
    found = []
    for package in _PACKAGES:
        if package.removesuffix("-gpu") in sys.modules:
            try:
                found.append(f"{package} {version(package)}")
            except PackageNotFoundError:
                continue
    return ", ".join(found) or "its library"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _onnx(x: np.ndarray) -> np.ndarray:
    from policy_server.engine.onnx import OnnxEngine

    return _y(OnnxEngine(_GRAPHS, 1), x)


def _onnx_cuda(x: np.ndarray) -> np.ndarray:
    from policy_server.engine.onnx import OnnxEngine

    return _y(OnnxEngine(_GRAPHS, 1, device="cuda"), x)


def _openvino(x: np.ndarray) -> np.ndarray:
    from policy_server.engine.openvino import OpenVinoEngine

    return _y(OpenVinoEngine(_GRAPHS, 1, "f32"), x)


def _openvino_bf16(x: np.ndarray) -> np.ndarray:
    from policy_server.engine.openvino import OpenVinoEngine

    return _y(OpenVinoEngine(_GRAPHS, 1, "bf16"), x)


def _openvino_int8(x: np.ndarray) -> np.ndarray:
    from policy_server.engine.openvino import OpenVinoEngine

    return _y(OpenVinoEngine(_GRAPHS, 1, "int8"), x)


def _torch(x: np.ndarray) -> np.ndarray:
    return _torch_on("cpu", "float32", x)


def _torch_cuda(x: np.ndarray) -> np.ndarray:
    return _torch_on("cuda", "float32", x)


def _torch_cuda_bf16(x: np.ndarray) -> np.ndarray:
    return _torch_on("cuda", "bfloat16", x)


def _torch_on(device: str, dtype: str, x: np.ndarray) -> np.ndarray:
    import torch

    if device == "cuda" and torch.version.cuda is None:
        raise EngineNotInstalled(f"torch {torch.__version__} was built without CUDA")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceNotFound("torch sees no CUDA device")
    to = {"device": torch.device(device), "dtype": getattr(torch, dtype)}
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(**to)
    result: np.ndarray = (torch.from_numpy(x).to(**to) @ w).float().cpu().numpy()
    return result


def _tensorrt(x: np.ndarray) -> np.ndarray:
    import tensorrt as trt
    import torch

    from policy_server.engine.tensorrt import Log

    if not torch.cuda.is_available():
        raise DeviceNotFound("torch sees no CUDA device")
    trt.Builder(Log())  # raises if the library cannot use the device; plans are checked by their golden cases
    return _torch_cuda(x)


def _y(engine: Engine, x: np.ndarray) -> np.ndarray:
    y: np.ndarray = engine.run("tiny", {"x": x})["y"]
    engine.close()
    return y


_RUNS: Mapping[str, Run] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "openvino-bf16": _openvino_bf16,
    "openvino-int8": _openvino_int8,
    "onnx-cuda": _onnx_cuda,
    "torch-cuda": _torch_cuda,
    "torch-cuda-bf16": _torch_cuda_bf16,
    "torch": _torch,
    "tensorrt": _tensorrt,
}
ENGINE_CHECKS = tuple(_RUNS)
