"""What came of building plans, for programs and for people."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from policy_server.export.plans import BuildOptions, Machine

_LAYERS_SHOWN = 15


@dataclass(frozen=True)
class GraphReport:
    """One plan.

    Attributes:
        build_s: Time that the build took; 0 if the plan came from the cache.
        plan_bytes: Size of the plan, nearly all of it weights.
        memory_bytes: Device memory for activations, besides the weights.
        layer_ms: Median time of every layer for one golden call, in the order of execution.
    """

    build_s: float
    plan_bytes: int
    memory_bytes: int
    layer_ms: Mapping[str, float]


@dataclass(frozen=True)
class BuildReport:
    """The plans of one bundle.

    Attributes:
        policy: Name of the bundle.
        version: Its publisher's version.
        options: How the plans were built.
        machine: What they were built with and measured on.
        drift: From the golden case, as a fraction of the action range.
        tolerance: What of that is allowed.
        expected_drift: What the same graphs have in eager torch, rounding included.
        moved: How far actions move from float32 over recorded observations, in eager torch: (mean, largest), as
            fractions of the action range; None where none were recorded.
        chunk_ms: Median time for the golden chunk, copies to and from the device included.
        graphs: Every plan by graph.
    """

    policy: str
    version: str
    options: BuildOptions
    machine: Machine
    drift: float
    tolerance: float
    expected_drift: float
    moved: tuple[float, float] | None
    chunk_ms: float
    graphs: Mapping[str, GraphReport]


def write_report(folder: Path, report: BuildReport) -> None:
    """Write `report.json` and `report.md`."""
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: BuildReport) -> str:
    """Return the report as a page."""
    options, machine, batch = report.options, report.machine, report.options.batch
    recorded = ""
    if report.moved:
        mean, largest = report.moved
        recorded = f" Over recorded observations actions move by {mean:.1e} on average, {largest:.1e} at most."
    lines = [
        f"# TensorRT plans of {report.policy} {report.version}",
        "",
        f"Precision {options.precision}, TensorRT {machine.tensorrt}, {machine.gpu} (compute capability "
        f"{machine.compute_capability}), {batch.min} to {batch.max} rows, fastest at {batch.opt}, optimisation level "
        f"{options.level}{', version-compatible' if options.version_compatible else ''}.",
        "",
        f"Golden drift {report.drift:.1e} of the action range (allowed {report.tolerance:.1e}, in eager torch "
        f"{report.expected_drift:.1e}).{recorded} A chunk takes {report.chunk_ms:.2f} ms, copies included.",
        "",
        "| graph | built in | plan | activations | layers | sum of layers |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, graph in report.graphs.items():
        built = f"{graph.build_s:.1f} s" if graph.build_s else "from the cache"
        lines.append(
            f"| {name} | {built} | {graph.plan_bytes / 1e6:.1f} MB | {graph.memory_bytes / 1e6:.1f} MB | "
            f"{len(graph.layer_ms)} | {sum(graph.layer_ms.values()):.3f} ms |"
        )
    for name, graph in report.graphs.items():
        slowest = sorted(graph.layer_ms.items(), key=lambda item: -item[1])[:_LAYERS_SHOWN]
        lines += ["", f"## {name}: the slowest layers", "", "| layer | ms |", "| --- | --- |"]
        lines += [f"| {layer.replace('|', '/')} | {ms:.4f} |" for layer, ms in slowest]
    return "\n".join(lines) + "\n"
