"""The engines that contract tests run on this machine."""

from collections.abc import Iterable
from typing import Any, Literal

import pytest
import torch

from policy_server.bundle import Bundle
from policy_server.engine.base import ENGINES, Engine
from policy_server.engine.torch import load_weights
from policy_server.engine.torch_cuda import RecordingEngine
from policy_server.errors import EngineNotInstalled

# What needs no GPU of the engines that need one: all but the recording itself.
RECORDING: dict[str, Literal["f32", "bf16"]] = {"torch-cuda as on a GPU": "f32", "torch-cuda-bf16 as on a GPU": "bf16"}


def parameters(precisions: Iterable[str]) -> list[Any]:
    """Return the engines of some precisions as parameters of a fixture."""
    wanted = set(precisions)
    on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))
    engines = [
        pytest.param(name, marks=on_gpu if choice.device == "cuda" else ())
        for name, choice in ENGINES.items()
        if choice.precision in wanted
    ]
    return [*engines, *(name for name, precision in RECORDING.items() if precision in wanted)]


def make_engine(name: str, bundle: Bundle) -> Engine:
    """Return an engine of `parameters`."""
    if name in RECORDING:
        return make_recording_engine(name, bundle, RECORDING[name])
    try:
        engine = ENGINES[name].make(bundle, 1)
    except EngineNotInstalled as error:
        if ENGINES[name].device == "cpu":
            raise
        # ONNX Runtime for GPUs takes the place of the one for CPUs, which other tests need.
        pytest.skip(str(error))
    assert engine.precision == ENGINES[name].precision
    return engine


def make_recording_engine(
    name: str, bundle: Bundle, precision: Literal["f32", "bf16"] = "f32", **options: Any
) -> RecordingEngine:
    """Return the engine of a GPU on the CPU, where a recording is the work itself."""
    graphs = bundle.family.make_graphs(bundle.spec, bundle.config, load_weights(bundle.weights))
    record = options.pop("record", _run_once)
    return RecordingEngine(name, precision, graphs, torch.device("cpu"), record, **options)


def _run_once(work: Any) -> Any:
    work()
    return work
