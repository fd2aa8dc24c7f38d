"""What an engine is, and which there are."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from policy_server.errors import EngineUnavailable

if TYPE_CHECKING:
    from policy_server.bundle import Bundle

Tensors = Mapping[str, np.ndarray]

# Not in the table below: the whole way from observation to chunk runs on a server elsewhere, see `engine.triton`.
TRITON = "triton"


# Beyond that, an event loop in the same process does not keep up.
_MOST_RUNS = 4


class Engine(Protocol):
    """Runs the graphs of one bundle.

    Attributes:
        name: Its name in `ENGINES`.
        precision: What it computes in.
        differentiable: Whether it is a `DifferentiableEngine`.
        most_runs: How many threads may use it at the same time.
    """

    name: str
    precision: str
    differentiable: bool
    most_runs: int

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        """Run one graph.

        Args:
            graph: Name of the graph, such as "denoise".
            inputs: Named arrays whose first axis is the batch; any batch size from 1 on.

        Returns:
            Named arrays that belong to the caller, their first axis the batch again.
        """

    def close(self) -> None:
        """Give back what the engine holds; it is not used again."""


def runs_at_once(threads: int) -> int:
    """Return how many runs of `threads` threads each fit onto this machine's cores; one if the library chooses."""
    return max(1, min(_MOST_RUNS, len(os.sched_getaffinity(0)) // threads)) if threads else 1


class DifferentiableEngine(Engine, Protocol):
    """An engine that can say how a graph's output depends on one of its inputs."""

    def run_with_gradient(self, graph: str, inputs: Tensors, cotangent: np.ndarray) -> Tensors:
        """Run one graph, and multiply `cotangent` by the Jacobian of its first output by `DIFFERENTIATED`.

        Args:
            graph: Name of the graph.
            inputs: As of `run`.
            cotangent: Shaped like the graph's first output.

        Returns:
            As of `run`, and under `GRADIENT` the product, shaped like that input.
        """


@dataclass(frozen=True)
class EngineChoice:
    """One way to run a bundle.

    Attributes:
        precision: What the engine computes in; the bundle states a tolerance for each.
        extra: The extra of this distribution that installs its library.
        automatic: Whether "auto" may choose it.
        device: What it computes on.
        make: Builds the engine from a bundle and a number of threads (0 lets the library choose). It imports the
            engine's library, and raises ImportError where that is not installed.
    """

    precision: str
    make: "Callable[[Bundle, int], Engine]"
    extra: str
    automatic: bool = True
    device: Literal["cpu", "cuda"] = "cpu"


def _make_onnx(bundle: "Bundle", threads: int) -> Engine:
    from policy_server.engine.onnx import OnnxEngine

    return OnnxEngine(bundle.graphs(), threads, gradients=bundle.gradients())


def _make_onnx_cuda(bundle: "Bundle", threads: int) -> Engine:
    from policy_server.engine.onnx import OnnxEngine

    return OnnxEngine(bundle.graphs(), threads, gradients=bundle.gradients(), device="cuda")


def _make_openvino_f32(bundle: "Bundle", threads: int) -> Engine:
    from policy_server.engine.openvino import OpenVinoEngine

    return OpenVinoEngine(bundle.graphs(), threads, "f32", gradients=bundle.gradients())


def _make_openvino_bf16(bundle: "Bundle", threads: int) -> Engine:
    from policy_server.engine.openvino import OpenVinoEngine

    return OpenVinoEngine(bundle.graphs(), threads, "bf16", gradients=bundle.gradients())


def _make_openvino_int8(bundle: "Bundle", threads: int) -> Engine:
    from policy_server.engine.openvino import OpenVinoEngine

    if bundle.graphs() and not bundle.graphs("int8"):
        raise EngineUnavailable(f"{bundle.name!r} has no variant with int8 weights")
    return OpenVinoEngine(bundle.graphs("int8"), threads, "int8")


def _make_torch(bundle: "Bundle", threads: int) -> Engine:
    from policy_server.engine.torch import TorchEngine

    return TorchEngine(bundle.family, bundle.spec, bundle.config, bundle.weights, threads)


def _make_torch_cuda_f32(bundle: "Bundle", threads: int) -> Engine:
    from policy_server.engine.torch_cuda import make_torch_cuda

    return make_torch_cuda(bundle.family, bundle.spec, bundle.config, bundle.weights, "f32")


def _make_torch_cuda_bf16(bundle: "Bundle", threads: int) -> Engine:
    from policy_server.engine.torch_cuda import make_torch_cuda

    return make_torch_cuda(bundle.family, bundle.spec, bundle.config, bundle.weights, "bf16")


ENGINES: Mapping[str, EngineChoice] = {
    "onnx": EngineChoice("f32", _make_onnx, "onnx"),
    "openvino": EngineChoice("f32", _make_openvino_f32, "openvino"),
    "openvino-bf16": EngineChoice("bf16", _make_openvino_bf16, "openvino"),
    # Its error is of another order than rounding, so somebody must have wanted it.
    "openvino-int8": EngineChoice("int8", _make_openvino_int8, "openvino", automatic=False),
    # For machines with CUDA and without TensorRT; a robot's server must not move to another device by itself.
    "onnx-cuda": EngineChoice("f32", _make_onnx_cuda, "onnx-cuda", automatic=False, device="cuda"),
    "torch-cuda": EngineChoice("f32", _make_torch_cuda_f32, "torch", automatic=False, device="cuda"),
    "torch-cuda-bf16": EngineChoice("bf16", _make_torch_cuda_bf16, "torch", automatic=False, device="cuda"),
    # The oracle is there for comparison, and is never the fastest.
    "torch": EngineChoice("f32", _make_torch, "torch", automatic=False),
}
