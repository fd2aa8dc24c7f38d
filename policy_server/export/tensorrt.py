"""Builds TensorRT plans of a bundle: strongly typed, cached, checked against the golden case, and measured."""

import logging
import re
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import tensorrt as trt
import torch
from tqdm import tqdm

from policy_server.bundle import Bundle, digest, load_bundle
from policy_server.engine.base import Tensors
from policy_server.engine.tensorrt import Log, TensorRTEngine, require_cuda
from policy_server.errors import BundleInvalid, EngineUnavailable, GoldenDrift, UnsupportedGraph
from policy_server.export.build_report import BuildReport, GraphReport, write_report
from policy_server.export.lowered import LoweredGraphs, lower_bundle, write_graphs
from policy_server.export.operators import check_operators
from policy_server.export.plans import (
    FORMAT,
    PLANS,
    Batch,
    BuildOptions,
    Machine,
    Plans,
    cache_key,
    plan_path,
    profile,
    write_plans,
)
from policy_server.golden import GoldenCase, check_golden

logger = logging.getLogger(__name__)

_ROUNDS = 50


def export_plans(
    path: Path,
    output: Path,
    options: BuildOptions,
    *,
    robots: int,
    max_robots: int,
    observations: Path | None,
    samples: int,
    tolerance: float | None,
    cache: Path,
) -> BuildReport:
    """Build a bundle's plans into `output/<policy>`, with `plans.json` and the report; what is there is replaced.

    Args:
        path: A bundle.
        output: Folder for the plans of many policies.
        options: How to build; the batch is filled in here.
        robots: How many ask at once, typically.
        max_robots: How many ask at once, at most.
        observations: Recorded ones to calibrate on.
        samples: How many of them.
        tolerance: Drift from the golden case that is accepted instead of the bundle's.
        cache: Folder of plans and timings from earlier builds.

    Raises:
        BundleInvalid: The bundle has no graphs, the folder holds something else, or observations are missing.
        EngineUnavailable: There is no CUDA device, or TensorRT cannot build.
        UnsupportedGraph: TensorRT does not know an operator.
        GoldenDrift: In this precision the golden case is missed; nothing was written.
    """
    machine = this_machine()
    bundle = load_bundle(path)
    folder = output / bundle.name
    if folder.exists() and any(folder.iterdir()) and not (folder / PLANS).exists():
        raise BundleInvalid(f"{folder} exists and holds no plans; nothing was written")
    options = replace(options, batch=Batch.of(bundle, robots=robots, max_robots=max_robots))
    low = lower_bundle(bundle, options.precision, observations=observations, samples=samples, tolerance=tolerance)
    if low.drift > low.tolerance:
        raise GoldenDrift(bundle.name, f"eager torch in {low.precision}", low.drift, low.tolerance)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{bundle.name}-") as scratch:
        graphs = write_graphs(low.graphs, Path(scratch) / "graphs")
        check_operators(graphs.values())
        builder = PlanBuilder(options, machine, cache)
        build_s = {name: builder.build(graph, plan_path(Path(scratch), name)) for name, graph in graphs.items()}
        plans = {name: plan_path(Path(scratch), name) for name in graphs}
        engine = TensorRTEngine(plans, low.precision, version_compatible=options.version_compatible)
        report = _measure(bundle, low, engine, options, machine, build_s, plans)
        layers = {name: engine.layers_json(name) for name in plans}
        engine.close()
        folder.mkdir(exist_ok=True)
        for name, plan in plans.items():
            plan.replace(plan_path(folder, name))
            (folder / f"{name}.layers.json").write_text(layers[name], encoding="utf-8")
    write_report(folder, report)
    sha256 = {name: digest(plan_path(folder, name)) for name in plans}
    write_plans(folder, Plans(FORMAT, bundle.name, bundle.digest, options, low.tolerance, machine, sha256))
    return report


def this_machine() -> Machine:
    """Return what plans would be built with here; raises EngineUnavailable if there is no CUDA device."""
    require_cuda()
    major, minor = torch.cuda.get_device_capability()
    return Machine(trt.__version__, torch.cuda.get_device_name(), f"{major}.{minor}")


class PlanBuilder:
    """Turns ONNX files into plans, each by one set of options."""

    def __init__(self, options: BuildOptions, machine: Machine, cache: Path) -> None:
        self._options, self._machine, self._cache = options, machine, cache
        # Timings of another version or device would be refused.
        what = re.sub(r"[^A-Za-z0-9.]+", "-", f"{machine.tensorrt}-{machine.gpu}")
        self._timings = cache / f"timings-{what}.bin"
        self._log = Log()
        self._monitor = _Progress()

    def build(self, graph: Path, plan: Path) -> float:
        """Write the plan of an ONNX file; return how many seconds the build took, 0 if it came from the cache."""
        self._cache.mkdir(parents=True, exist_ok=True)
        kept = self._cache / f"{cache_key(graph, graph.with_suffix('.weights'), self._options, self._machine)}.plan"
        if kept.exists():
            logger.info("%s: the plan is in the cache, %s", graph.stem, kept)
            plan.write_bytes(kept.read_bytes())
            return 0.0
        started_at_s = time.monotonic()
        plan.write_bytes(self._built(graph))
        _keep(kept, plan.read_bytes())
        return time.monotonic() - started_at_s

    def _built(self, graph: Path) -> bytes:
        builder = trt.Builder(self._log)
        # TensorRT 11 knows no other networks, and ignores the flag.
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._log)
        # From a file, since the weights are in another beside it, which may be larger than an ONNX file can be.
        if not parser.parse_from_file(str(graph)):
            reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise UnsupportedGraph(f"TensorRT {trt.__version__} cannot read the graph {graph.stem!r}: {reasons}")
        config = self._config(builder, graph)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineUnavailable(f"TensorRT {trt.__version__} cannot build {graph.stem!r}; the log says why")
        _keep(self._timings, bytes(config.get_timing_cache().serialize()))
        return bytes(plan)

    def _config(self, builder: trt.Builder, graph: Path) -> trt.IBuilderConfig:
        options, config = self._options, builder.create_builder_config()
        config.builder_optimization_level = options.level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = self._monitor
        if options.workspace_bytes:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.precision == "f32":
            config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default, and keeps 10 bits of mantissa
        shapes = builder.create_optimization_profile()
        for name, (least, typical, most) in profile(graph, options.batch).items():
            shapes.set_shape(name, trt.Dims(least), trt.Dims(typical), trt.Dims(most))
        if config.add_optimization_profile(shapes) < 0:
            raise EngineUnavailable(f"TensorRT refuses the shapes of {graph.stem!r}; the log says why")
        timings = config.create_timing_cache(self._timings.read_bytes() if self._timings.exists() else b"")
        if not config.set_timing_cache(timings, ignore_mismatch=False):
            raise EngineUnavailable(f"{self._timings} is not of this TensorRT and GPU; delete it")
        return config


def _measure(
    bundle: Bundle,
    low: LoweredGraphs,
    engine: TensorRTEngine,
    options: BuildOptions,
    machine: Machine,
    build_s: Mapping[str, float],
    plans: Mapping[str, Path],
) -> BuildReport:
    """Replay the golden case, and time it; raises GoldenDrift."""
    case, program, recorder = GoldenCase(bundle.path / "golden.npz"), bundle.new_program(), _Recorder(engine)
    drift = check_golden(bundle.name, case, program, recorder, {low.precision: low.tolerance})
    times_ms = []
    for _ in range(_ROUNDS):
        started_at_s = time.perf_counter()
        case.drift(program, engine)
        times_ms.append(1e3 * (time.perf_counter() - started_at_s))
    graphs = {
        name: GraphReport(
            build_s[name],
            plan.stat().st_size,
            engine.memory_bytes(name),
            engine.layer_ms(name, recorder.calls[name], _ROUNDS) if name in recorder.calls else {},
        )
        for name, plan in plans.items()
    }
    return BuildReport(
        bundle.name,
        bundle.manifest.version,
        options,
        machine,
        drift,
        low.tolerance,
        low.drift,
        low.moved,
        median(times_ms),
        graphs,
    )


class _Recorder:
    """An engine that remembers the last inputs of every graph."""

    differentiable = False
    most_runs = 1

    def __init__(self, engine: TensorRTEngine) -> None:
        self.name, self.precision = engine.name, engine.precision
        self.calls: dict[str, Tensors] = {}
        self._engine = engine

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        self.calls[graph] = inputs
        return self._engine.run(graph, inputs)

    def close(self) -> None:
        self.calls.clear()


class _Progress(trt.IProgressMonitor):
    """One bar for every phase that TensorRT is in; it may report from several threads."""

    def __init__(self) -> None:
        super().__init__()
        self._bars: dict[str, tqdm] = {}
        self._lock = threading.Lock()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._lock:
            self._bars[phase_name] = tqdm(total=num_steps, desc=phase_name, leave=parent_phase is None, unit="step")

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self._lock:
            bar = self._bars[phase_name]
            bar.update(step + 1 - bar.n)
        return True

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            self._bars.pop(phase_name).close()


def _keep(path: Path, content: bytes) -> None:
    """Write a file of the cache whole or not at all: other builds may read it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
