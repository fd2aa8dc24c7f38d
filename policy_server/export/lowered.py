"""A bundle's graphs in a precision of choice, for compilers that keep every type: calibrated, lowered, exported."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from tqdm import tqdm

from policy_models.precision import CALIBRATED, InputRanges, lowered
from policy_models.program import Graph, Outcome
from policy_models.spec import Observation, Precision, SamplingOptions
from policy_server.bundle import Bundle
from policy_server.engine.base import Tensors
from policy_server.engine.torch import load_weights
from policy_server.errors import BundleInvalid
from policy_server.export.observations import read_observations
from policy_server.export.onnx import forget_origin, to_onnx
from policy_server.golden import GoldenCase, action_range
from policy_server.runtime.sampling import drive

logger = logging.getLogger(__name__)

# Drift from the golden case that each precision may have, as a fraction of the action range, where a bundle states
# none; docs/tensorrt.md has what was measured.
TOLERANCE: Mapping[str, float] = {"f32": 1e-4, "f16": 2e-3, "bf16": 2e-2, "fp8": 5e-2, "int8": 5e-2}

# Prime, so that few of the observations that are compared are those of the calibration.
_COMPARED = 23


@dataclass(frozen=True)
class LoweredGraphs:
    """The graphs of one bundle in one precision.

    Attributes:
        graphs: By name; what is exported is lowered.
        precision: What their products are computed in.
        tolerance: Drift from the golden case that they may have.
        drift: What they have in eager torch, rounding included.
        moved: How far actions move from float32 to this precision over recorded observations that lie between those of
            the calibration: (mean, largest), as fractions of the action range; None where none were recorded.
    """

    graphs: Mapping[str, Graph]
    precision: Precision
    tolerance: float
    drift: float
    moved: tuple[float, float] | None


def lower_bundle(
    bundle: Bundle, precision: Precision, *, observations: Path | None, samples: int, tolerance: float | None = None
) -> LoweredGraphs:
    """Lower a bundle's graphs.

    Args:
        bundle: With graphs.
        precision: What their products are computed in.
        observations: Recorded ones, to calibrate on and to compare with float32; see `read_observations`. "fp8" and
            "int8" need them.
        samples: How many observations to calibrate on.
        tolerance: Drift from the golden case that is accepted; what the bundle says, or `TOLERANCE`, if None.

    Raises:
        BundleInvalid: It has no graphs, or the observations are missing or do not fit.
    """
    if not bundle.graphs():
        raise BundleInvalid(
            f"{bundle.name} has no graphs: policies of the family {bundle.manifest.family} compute none"
        )
    if precision in CALIBRATED and observations is None:
        inputs = [*(camera.name for camera in bundle.spec.cameras), *(["state"] if bundle.spec.state else [])]
        raise BundleInvalid(
            f"{precision} must be calibrated on what {bundle.name} will see; noise would give wrong scales. Name an "
            f".npz file of recorded observations (--observations) with the arrays {', '.join(inputs)} and goal, a row "
            "for each; docs/tensorrt.md shows how to record one"
        )
    graphs = bundle.family.make_graphs(bundle.spec, bundle.config, load_weights(bundle.weights))
    recorded = read_observations(observations, bundle.spec) if observations else ()
    ranges: Mapping[str, InputRanges] = calibrate(bundle, graphs, recorded, samples) if precision in CALIBRATED else {}
    small = {
        name: replace(graph, exported=lowered(_compiled(graph), precision, ranges.get(name)))
        for name, graph in graphs.items()
    }
    drift = GoldenCase(bundle.path / "golden.npz").drift(bundle.new_program(), EagerEngine(small, precision))
    moved = _moved(bundle, EagerEngine(graphs, "f32"), EagerEngine(small, precision), recorded) if recorded else None
    stated = bundle.manifest.tolerance.get(precision, TOLERANCE[precision])
    return LoweredGraphs(small, precision, stated if tolerance is None else tolerance, drift, moved)


def calibrate(
    bundle: Bundle, graphs: Mapping[str, Graph], observations: Sequence[Observation], samples: int
) -> Mapping[str, InputRanges]:
    """Return what the layers of each graph are given while the program answers recorded observations.

    Evenly spaced observations are answered, each at the end of a window of those before it; raises BundleInvalid if
    there are fewer than a window.
    """
    engine = EagerEngine(graphs, "f32")
    ranges = {name: InputRanges() for name in graphs}
    with ExitStack() as stack:
        for name, graph in graphs.items():
            stack.enter_context(ranges[name].watch(_compiled(graph)))
        for seed, window in enumerate(tqdm(_windows(bundle, observations, samples), desc="calibrate")):
            _answer(bundle, engine, window, seed)
    return ranges


def _moved(
    bundle: Bundle, before: "EagerEngine", after: "EagerEngine", observations: Sequence[Observation]
) -> tuple[float, float]:
    windows = _windows(bundle, observations, _COMPARED)
    chunks = [
        (_answer(bundle, before, window, seed), _answer(bundle, after, window, seed))
        for seed, window in enumerate(tqdm(windows, desc="compare"))
    ]
    moved = np.stack([np.abs(after - before) / action_range(bundle.spec, before) for before, after in chunks])
    return float(moved.mean()), float(moved.max())


def _windows(bundle: Bundle, observations: Sequence[Observation], count: int) -> Sequence[Sequence[Observation]]:
    """Return evenly spaced stretches of observations, each as long as the policy looks back."""
    window = bundle.spec.window
    last = len(observations) - window
    if last < 0:
        raise BundleInvalid(f"{bundle.name} looks back on {window} observations, only {len(observations)} are recorded")
    starts = np.linspace(0, last, min(count, last + 1)).astype(int)
    return [observations[start : start + window] for start in starts]


def _answer(bundle: Bundle, engine: "EagerEngine", window: Sequence[Observation], seed: int) -> np.ndarray:
    """Return the chunk, (H, A), that answers the last of a robot's observations."""
    program = bundle.new_program()
    outcome = Outcome(np.empty(0), program.begin())
    for observation in window:
        outcome = drive(program.infer(observation, outcome.memory, SamplingOptions(seed)), engine)
    return outcome.actions


def write_graphs(graphs: Mapping[str, Graph], folder: Path) -> Mapping[str, Path]:
    """Write `<name>.onnx` with its weights beside it in `<name>.weights` for every graph; return the paths.

    The weights are not the bundle's: they have other types, and TensorRT reads no file outside the graph's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, graph in graphs.items():
        logger.info("exporting the graph %s", name)
        model = to_onnx(graph)
        forget_origin(model)
        paths[name] = folder / f"{name}.onnx"
        ir.save(model, paths[name], external_data=f"{name}.weights")
    return paths


def onnx_drift(bundle: Bundle, graphs: Mapping[str, Path], precision: Precision) -> float | None:
    """Return the drift of exported graphs in ONNX Runtime; None for bfloat16, which it cannot multiply on CPUs."""
    from policy_server.engine.onnx import OnnxEngine

    if precision == "bf16":
        return None
    engine = OnnxEngine(graphs, threads=0)
    return GoldenCase(bundle.path / "golden.npz").drift(bundle.new_program(), engine)


class EagerEngine:
    """Runs graphs in eager torch, in the form that is exported."""

    name = "eager torch"
    differentiable = False
    most_runs = 1

    def __init__(self, graphs: Mapping[str, Graph], precision: Precision) -> None:
        self.precision: str = precision
        self._graphs = graphs

    def run(self, graph: str, inputs: Tensors) -> Tensors:
        """Run one graph; see `Engine.run`."""
        definition = self._graphs[graph]
        with torch.inference_mode():
            results = _compiled(definition)(*(torch.from_numpy(inputs[name]) for name in definition.inputs))
        results = (results,) if isinstance(results, torch.Tensor) else results
        return {name: value.numpy() for name, value in zip(definition.outputs, results, strict=True)}

    def close(self) -> None:
        """Drop the modules."""
        self._graphs = {}


def _compiled(graph: Graph) -> torch.nn.Module:
    module: torch.nn.Module = graph.exported or graph.module
    return module
