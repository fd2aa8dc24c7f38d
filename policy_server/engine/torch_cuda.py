"""The networks in torch on an NVIDIA GPU, each kind of call recorded once as a CUDA graph and then replayed."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from policy_models.families import Family
from policy_models.program import Graph
from policy_models.spec import PolicySpec
from policy_server.engine.base import Tensors
from policy_server.engine.torch import load_weights
from policy_server.errors import DeviceNotFound, EngineNotInstalled

logger = logging.getLogger(__name__)

# A policy is asked for a handful of batch sizes; a MoDE policy for as many ways as it has noise levels, at each.
CAPACITY = 128
# Libraries choose kernels and allocate on first calls, which cannot be recorded.
_WARM_UPS = 3

Work = Callable[[], None]
Record = Callable[[Work], Work]  # from what writes to tensors that stay in place, to what does it again


class RecordingEngine:
    """Runs networks from recordings: one for each graph, number of rows, and way through the graph."""

    differentiable = False
    most_runs = 1

    def __init__(
        self,
        name: str,
        precision: Literal["f32", "bf16"],
        graphs: Mapping[str, Graph],
        device: torch.device,
        record: Record,
        *,
        capacity: int = CAPACITY,
    ) -> None:
        """Move the networks to the device.

        Args:
            name: The engine's name.
            precision: With "bf16", matrices are kept and multiplied in bfloat16, and everything else in float32.
            graphs: Networks by name.
            device: Where they run.
            record: Makes a recording of work on that device; raises RuntimeError if there can be none.
            capacity: Recordings that are kept; the least recently used is dropped.
        """
        self.name = name
        self.precision: str = precision
        self._graphs = graphs
        self._device = device
        self._record = record
        self._capacity = capacity
        self._modules: dict[str, Any] = {name: graph.steered or graph.module for name, graph in graphs.items()}
        for module in self._modules.values():
            if precision == "bf16":
                _round_matrices(module)
            module.to(device)
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        """Run one graph; see `Engine.run`. The first call of a kind takes the time of several."""
        definition = self._graphs[graph]
        way = definition.steered.steer(inputs) if definition.steered else None
        arrays = [inputs[name] for name in definition.inputs]
        key = (graph, len(arrays[0]), way)
        with torch.inference_mode():
            recording = self._recordings.get(key)
            if recording is None:
                recording = self._recordings[key] = self._make_recording(graph, arrays)
                while len(self._recordings) > self._capacity:
                    self._recordings.popitem(last=False)
            self._recordings.move_to_end(key)
            return dict(zip(definition.outputs, recording.run(arrays), strict=True))

    def close(self) -> None:
        """Drop recordings and networks."""
        self._recordings.clear()
        self._modules.clear()
        self._graphs = {}

    def _make_recording(self, graph: str, arrays: Sequence[np.ndarray]) -> "_Recording":
        module = self._modules[graph]
        # Weights are rounded already; a cache of rounded ones would not outlive the recording that filled it.
        rounded = torch.autocast(
            self._device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False
        )

        def compute(*inputs: Tensor) -> tuple[Tensor, ...]:
            with rounded:
                results = module(*inputs)
            return tuple(value.float() for value in ((results,) if isinstance(results, Tensor) else results))

        try:
            return _Recording(compute, arrays, self._device, self._record)
        except RuntimeError as error:
            logger.warning(
                "%s: %r cannot be recorded, its kernels are launched one by one: %s", self.name, graph, error
            )
            return _Recording(compute, arrays, self._device, lambda work: work)


class _Recording:
    """One kind of call, its tensors staying in place: inputs are written into them, and outputs read from them."""

    def __init__(
        self,
        compute: Callable[..., tuple[Tensor, ...]],
        arrays: Sequence[np.ndarray],
        device: torch.device,
        record: Record,
    ) -> None:
        staged = [torch.from_numpy(np.array(array)) for array in arrays]
        # From memory that the system cannot move, copies need not wait for each other.
        self._staged = [tensor.pin_memory() for tensor in staged] if device.type == "cuda" else staged
        self._inputs = [tensor.to(device, copy=True) for tensor in staged]
        self._results: tuple[Tensor, ...] = ()

        def work() -> None:
            self._results = compute(*self._inputs)

        self._replay = record(work)

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for these inputs, which have the shapes that were recorded."""
        for staged, tensor, array in zip(self._staged, self._inputs, arrays, strict=True):
            np.copyto(staged.numpy(), array)
            tensor.copy_(staged, non_blocking=True)
        self._replay()
        return [tensor.to("cpu", copy=True).numpy() for tensor in self._results]


class CudaRecorder:
    """Records work as CUDA graphs, which share their memory: one runs after the other."""

    # A process may record one graph at a time, on whatever streams, and every policy has a thread of its own.
    _turn = threading.Lock()

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Record `work`; raises RuntimeError if it waits for the device."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other policies' threads may use the GPU meanwhile.
        with self._turn, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


def make_torch_cuda(
    family: Family, spec: PolicySpec, config: Any, weights: Path, precision: Literal["f32", "bf16"]
) -> RecordingEngine:
    """Return the engine for a bundle.

    Raises:
        EngineNotInstalled: torch was built without CUDA.
        DeviceNotFound: There is no NVIDIA GPU that torch can use.
    """
    name = "torch-cuda" if precision == "f32" else f"torch-cuda-{precision}"
    if torch.version.cuda is None:
        raise EngineNotInstalled(
            f"engine {name!r}: this torch ({torch.__version__}) was built without CUDA; "
            "pip uninstall torch, then pip install one that was built with it"
        )
    if not torch.cuda.is_available():
        raise DeviceNotFound(
            f"engine {name!r}: torch {torch.__version__} finds no NVIDIA GPU whose driver runs "
            f"CUDA {torch.version.cuda}"
        )
    # Left alone, convolutions of float32 are rounded to TensorFloat-32.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    graphs = family.make_graphs(spec, config, load_weights(weights) if weights.exists() else {})
    return RecordingEngine(name, precision, graphs, torch.device("cuda"), CudaRecorder())


def _round_matrices(module: nn.Module) -> None:
    """Keep what autocast would round in every call, in bfloat16."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.to(torch.bfloat16)
