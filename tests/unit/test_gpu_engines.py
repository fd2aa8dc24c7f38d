"""Engines of GPUs, as far as a machine without one can tell."""

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

from policy_server.bundle import Bundle, load_bundle
from policy_server.catalog import load_engine
from policy_server.engine.base import ENGINES
from policy_server.engine.onnx import CUDA
from policy_server.engine.torch import load_weights
from policy_server.engine.torch_cuda import CudaRecorder
from policy_server.errors import DeviceNotFound, EngineNotInstalled
from policy_server.golden import GoldenCase
from tests.conftest import ZOO
from tests.contract.engines import make_recording_engine

GPU_ENGINES = [name for name, choice in ENGINES.items() if choice.device == "cuda"]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
built_without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")


def _inputs(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "noisy": draw.standard_normal((rows, 4, 2), dtype=np.float32),
        "sigma": draw.uniform(0.05, 1.0, rows).astype(np.float32),
        "states": draw.standard_normal((rows, 1, 4), dtype=np.float32),
        "goal": draw.standard_normal((rows, 1, 4), dtype=np.float32),
    }


class CountingRecorder:
    """Records nothing, and says how often it was asked to."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        work()
        return work


def test_calls_of_one_kind_share_a_recording(tiny_bundle: Bundle) -> None:
    recorder = CountingRecorder()
    engine = make_recording_engine("recording", tiny_bundle, record=recorder)
    for rows in (1, 2, 1, 1, 2):
        engine.run("denoise", _inputs(rows))
    assert recorder.recorded == 2


def test_the_least_recently_used_recording_is_dropped(tiny_bundle: Bundle) -> None:
    recorder = CountingRecorder()
    engine = make_recording_engine("recording", tiny_bundle, record=recorder, capacity=2)
    for rows in (1, 2, 1, 3, 1):
        engine.run("denoise", _inputs(rows))
    assert recorder.recorded == 3
    engine.run("denoise", _inputs(2))
    assert recorder.recorded == 4


def test_what_cannot_be_recorded_is_computed_all_the_same(
    tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = make_recording_engine("recording", tiny_bundle, record=refuse)
    oracle = ENGINES["torch"].make(tiny_bundle, 1)
    with caplog.at_level(logging.WARNING):
        for seed in (0, 1):
            got = engine.run("denoise", _inputs(2, seed))["denoised"]
            np.testing.assert_array_equal(got, oracle.run("denoise", _inputs(2, seed))["denoised"])
    assert [record.message for record in caplog.records] == [
        "recording: 'denoise' cannot be recorded, its kernels are launched one by one: "
        "operation not permitted when stream is capturing"
    ]


def test_arrays_of_a_received_message_are_taken_as_they_are(tiny_bundle: Bundle) -> None:
    engine = make_recording_engine("recording", tiny_bundle)
    wanted = engine.run("denoise", _inputs(2))["denoised"]
    received = {k: np.frombuffer(v.tobytes(), v.dtype).reshape(v.shape) for k, v in _inputs(2).items()}
    np.testing.assert_array_equal(engine.run("denoise", received)["denoised"], wanted)


def test_a_way_through_mode_is_the_experts_that_any_row_chose(tiny_mode_bundle: Bundle) -> None:
    recorder = CountingRecorder()
    engine = make_recording_engine("recording", tiny_mode_bundle, record=recorder)
    shape = tiny_mode_bundle.config.transformer
    draw = np.random.default_rng(0)
    inputs = {
        "noisy": draw.standard_normal((2, shape.horizon, shape.action_width), dtype=np.float32),
        "sigma": np.full(2, 0.3, np.float32),
        "tokens": draw.standard_normal((2, 2, shape.token_width), dtype=np.float32),
        "goal": draw.standard_normal((2, shape.goal_width), dtype=np.float32),
    }

    def ask(*routes: list[float]) -> None:
        route = np.repeat(np.array(routes, np.float32)[:, None], shape.layers, axis=1)
        engine.run("denoise", {**inputs, "route": route})

    ask([0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0])
    ask([0.2, 0.8, 0, 0], [0.9, 0.1, 0, 0])
    assert recorder.recorded == 1
    ask([0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0])
    assert recorder.recorded == 2
    ask([0.1, 0, 0.9, 0], [0, 1, 0, 0])
    assert recorder.recorded == 2


def test_a_policy_that_replays_its_golden_case_keeps_its_recordings(tiny_mode_bundle: Bundle) -> None:
    recorder = CountingRecorder()
    engine = make_recording_engine("recording", tiny_mode_bundle, record=recorder)
    case, program = GoldenCase(tiny_mode_bundle.path / "golden.npz"), tiny_mode_bundle.new_program()
    assert case.drift(program, engine) < 1e-6
    recorded = recorder.recorded
    assert case.drift(program, engine) < 1e-6
    assert recorder.recorded == recorded


@pytest.mark.parametrize("policy", ["point-maze", "point-maze-step", "meta-world", "goal image"])
def test_nothing_that_is_recorded_asks_the_device_or_leaves_it(policy: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue("tiny_goal_image_bundle") if policy == "goal image" else load_bundle(ZOO / policy)
    graphs = bundle.family.make_graphs(bundle.spec, bundle.config, load_weights(bundle.weights))
    assert graphs
    for graph in graphs.values():
        recorded: Any = graph.steered or graph.module
        if graph.steered:
            graph.steered.steer({name: value.numpy() for name, value in graph.inputs.items()})
        # Tensors of this device have no values, and do not mix with those of another.
        with torch.inference_mode():
            results = recorded.to("meta")(*(value.to("meta") for value in graph.inputs.values()))
        assert results.is_meta


def test_a_process_records_one_graph_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    recording: list[object] = []
    most = 0

    @contextmanager
    def graph(made: object, **_: object) -> Iterator[None]:
        nonlocal most
        recording.append(made)
        most = max(most, len(recording))
        time.sleep(0.02)
        yield
        recording.remove(made)

    for name in ("graph_pool_handle", "Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    policies = [CudaRecorder() for _ in range(3)]
    with ThreadPoolExecutor() as threads:
        assert len(list(threads.map(lambda record: record(lambda: None), policies))) == 3
    assert most == 1


@without_gpu
@pytest.mark.parametrize("engine", GPU_ENGINES)
@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_gpu_that_is_not_there_is_named_in_one_line(tiny_bundle: Bundle, command: str, engine: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "policy_server", command, str(tiny_bundle.path), "--engine", engine],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == {"check": 1, "serve": 2}[command]
    said = [line for line in (done.stdout + done.stderr).splitlines() if f"engine {engine!r}: " in line]
    assert len(said) == 1
    assert "CUDA" in said[0]
    assert "Traceback" not in done.stderr


@without_gpu
def test_checking_every_engine_counts_no_missing_gpu_as_a_fault(tiny_bundle: Bundle) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "policy_server", "check", str(tiny_bundle.path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    for engine in GPU_ENGINES:
        assert any(
            line.split(None, 1)[0] == engine and line.endswith(("not installed", "no device for it"))
            for line in done.stdout.splitlines()
        )


@built_without_cuda
def test_a_torch_without_cuda_is_told_from_a_machine_without_a_gpu(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineNotInstalled, match=r"this torch \(.*\) was built without CUDA; pip uninstall torch"):
        load_engine(tiny_bundle, "torch-cuda", 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceNotFound, match=r"torch .* finds no NVIDIA GPU whose driver runs CUDA 13\.0"):
        load_engine(tiny_bundle, "torch-cuda", 1)


@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this ONNX Runtime has its CUDA provider")
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available provider names")
def test_an_onnx_runtime_that_computes_on_the_cpu_instead_is_refused(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineNotInstalled, match=r"without CUDAExecutionProvider; .*robot-policy-server\[onnx-cuda\]"):
        load_engine(tiny_bundle, "onnx-cuda", 1)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    with pytest.raises(DeviceNotFound, match="could not start CUDAExecutionProvider"):
        load_engine(tiny_bundle, "onnx-cuda", 1)


@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this ONNX Runtime has its CUDA provider")
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available provider names")
def test_a_provider_that_fails_later_is_not_replaced_by_the_cpu(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda _: [CUDA, "CPUExecutionProvider"])
    engine: Any = ENGINES["onnx-cuda"].make(tiny_bundle, 1)
    session = engine._sessions["denoise"]
    session._sess = MagicMock(wraps=session._sess)
    session._sess.run.side_effect = EPFail("CUDA failure 700: an illegal memory access was encountered")
    with pytest.raises(EPFail, match="illegal memory access"):
        engine.run("denoise", _inputs(2))


def test_no_server_moves_to_a_gpu_by_itself() -> None:
    assert not [name for name in GPU_ENGINES if ENGINES[name].automatic]
