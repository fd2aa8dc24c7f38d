"""Runs TensorRT plans on the CUDA device that they were built for. Tensors on the device are torch's."""

import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import numpy as np
import tensorrt as trt
import torch

from policy_server.engine.base import Tensors
from policy_server.errors import EngineUnavailable

logger = logging.getLogger(__name__)

_LEVELS = {
    trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
    trt.ILogger.Severity.ERROR: logging.ERROR,
    trt.ILogger.Severity.WARNING: logging.WARNING,
}
_DTYPES = {
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.HALF: torch.float16,
    trt.DataType.BF16: torch.bfloat16,
    trt.DataType.INT32: torch.int32,
    trt.DataType.INT64: torch.int64,
    trt.DataType.UINT8: torch.uint8,
    trt.DataType.BOOL: torch.bool,
}


class Log(trt.ILogger):
    """TensorRT's messages in this program's log; what it calls information is only of use to those who debug it."""

    def __init__(self) -> None:
        super().__init__()

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Pass on one message."""
        logger.log(_LEVELS.get(severity, logging.DEBUG), "TensorRT: %s", msg)


class TensorRTEngine:
    """Runs one plan per graph; batches larger than a plan takes go through it in parts."""

    name = "tensorrt"
    differentiable = False
    most_runs = 1

    def __init__(self, plans: Mapping[str, Path], precision: str, *, version_compatible: bool) -> None:
        """Load plans.

        Args:
            plans: Files by graph.
            precision: What the graphs were lowered to.
            version_compatible: Whether they were built so; such plans hold host code, which is run.

        Raises:
            EngineUnavailable: There is no CUDA device, or TensorRT refuses a plan.
        """
        self.precision = precision
        require_cuda()
        self._log = Log()
        self._runtime = trt.Runtime(self._log)
        self._runtime.engine_host_code_allowed = version_compatible
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._plans = {name: _Plan(self._runtime, path) for name, path in plans.items()}

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        """Run one graph; see `Engine.run`."""
        plan = self._plans[graph]
        rows = len(next(iter(inputs.values())))
        parts = [
            plan.run(
                plan.context, {name: array[at : at + plan.max_rows] for name, array in inputs.items()}, self._stream
            )
            for at in range(0, rows, plan.max_rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def layer_ms(self, graph: str, inputs: Tensors, rounds: int) -> Mapping[str, float]:
        """Return the median time of every layer of a plan, in the order of execution; see `Engine.run` for `inputs`."""
        plan, profiler = self._plans[graph], _LayerTimes()
        context = plan.new_context()  # the one that serves must not be slowed down
        context.profiler = profiler
        for _ in range(rounds + 1):
            plan.run(context, inputs, self._stream)
        # The first round is for warming up; a layer in a branch may have run in that one alone.
        return {layer: median(times[1:] or times) for layer, times in profiler.times_ms.items()}

    def memory_bytes(self, graph: str) -> int:
        """Return the device memory that a plan needs for its activations, besides its weights."""
        return self._plans[graph].engine.device_memory_size_v2

    def layers_json(self, graph: str) -> str:
        """Return what TensorRT's inspector tells about a plan; its form differs between versions."""
        inspector = self._plans[graph].engine.create_engine_inspector()
        return inspector.get_engine_information(trt.LayerInformationFormat.JSON)

    def close(self) -> None:
        """Give back the plans' memory."""
        self._plans.clear()


class _Plan:
    def __init__(self, runtime: trt.Runtime, path: Path) -> None:
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineUnavailable(
                f"TensorRT {trt.__version__} refuses {path}, the log says why; a plan runs on the version and the kind "
                "of GPU that it was built with"
            )
        self.path, self.engine = path, engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._dtypes = {name: _DTYPES[engine.get_tensor_dtype(name)] for name in names}
        self._outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        first = next(name for name in names if name not in self._outputs)
        self.max_rows = engine.get_tensor_profile_shape(first, 0)[-1][0]
        self.context = self.new_context()

    def new_context(self) -> trt.IExecutionContext:
        context = self.engine.create_execution_context()
        if context is None:
            raise EngineUnavailable(f"the device has no memory left for running {self.path}")
        return context

    def run(self, context: trt.IExecutionContext, inputs: Tensors, stream: torch.cuda.Stream) -> dict[str, np.ndarray]:
        with torch.cuda.stream(stream):
            # Held until the results are there: TensorRT has only the addresses.
            tensors = {n: torch.tensor(array, dtype=self._dtypes[n], device="cuda") for n, array in inputs.items()}
            for name, tensor in tensors.items():
                if not context.set_input_shape(name, tuple(tensor.shape)):
                    raise EngineUnavailable(f"{self.path} does not take {name!r} of shape {tuple(tensor.shape)}")
            for name in self._outputs:
                shape = context.get_tensor_shape(name)
                lengths = [shape[axis] for axis in range(len(shape))]
                tensors[name] = torch.empty(lengths, dtype=self._dtypes[name], device="cuda")
            for name, tensor in tensors.items():
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(stream.cuda_stream):
                raise EngineUnavailable(f"TensorRT failed to run {self.path}; the log says why")
            return {name: tensors[name].cpu().numpy() for name in self._outputs}


class _LayerTimes(trt.IProfiler):
    def __init__(self) -> None:
        super().__init__()
        self.times_ms: dict[str, list[float]] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        self.times_ms.setdefault(layer_name, []).append(ms)


def require_cuda() -> None:
    """Raise EngineUnavailable unless torch can use a CUDA device."""
    if not torch.cuda.is_available():
        raise EngineUnavailable(
            f"TensorRT needs an NVIDIA GPU and a torch built for CUDA; torch {torch.__version__} finds no device"
        )
