"""The command `policy-server export tensorrt`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from policy_server.console import log, or_explain
from policy_server.errors import EngineNotInstalled


def export_tensorrt(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of plans; these go into OUTPUT/<policy>.", show_default=False)
    ],
    precision: Annotated[
        Literal["f32", "f16", "bf16", "fp8", "int8"],
        typer.Option(
            help="What matrix products are computed in. f32 is exact; f16 is for GPUs with tensor cores; bf16 needs "
            "Ampere, fp8 Ada or Hopper or later; int8 and fp8 need --observations. Norms and softmax stay in float32."
        ),
    ] = "f16",
    observations: Annotated[
        Path | None,
        typer.Option(
            help="An .npz file of recorded observations to calibrate int8 and fp8 on: an array of images per camera "
            "under its name, 'state' and 'goal', as far as the policy has them; a row for each observation.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Observations to calibrate on, evenly spaced.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Robots that typically ask at once; plans are tuned for it.")] = 1,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Robots that ask at once at most. Plans take twice as many rows, for guidance.")
    ] = 8,
    level: Annotated[
        int, typer.Option(min=0, max=5, help="TensorRT's optimisation level: higher builds longer and runs faster.")
    ] = 3,
    workspace_mb: Annotated[
        int, typer.Option(min=0, help="Scratch memory for one layer, in MiB; 0 for all that the device has.")
    ] = 0,
    version_compatible: Annotated[
        bool,
        typer.Option(
            help="Build plans that later versions of TensorRT load too. They may be slower, and whoever loads them "
            "must allow their host code: tritonserver --backend-config=tensorrt,version-compatible=true."
        ),
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Drift from the golden case that is accepted, as a fraction of the action range; what the bundle "
            "states for this precision unless named, else f32 1e-4, f16 2e-3, bf16 2e-2, fp8 and int8 5e-2.",
            show_default=False,
        ),
    ] = None,
    cache: Annotated[
        Path, typer.Option(envvar="POLICY_SERVER_TENSORRT_CACHE", help="Folder of earlier plans and timings.")
    ] = Path(".tensorrt-cache"),
    graphs_only: Annotated[
        bool,
        typer.Option(
            "--graphs-only",
            help="Stop before TensorRT: write the ONNX graphs of this precision into OUTPUT/<policy>, check their "
            "operators and their drift from the golden case. Needs no GPU and no TensorRT.",
        ),
    ] = False,
) -> None:
    """Build TensorRT plans of a bundle, for the GPU of this machine.

    The networks are lowered to the precision in torch, exported to ONNX, checked against the operators that TensorRT
    supports, and built as strongly typed networks, so TensorRT computes in exactly the types that the graphs state.
    Then the plans replay the bundle's golden case; if they drift past the tolerance, nothing is written.

    OUTPUT/<policy> holds <graph>.plan, plans.json, and report.md and report.json with time per layer and memory.
    A plan runs on the kind of GPU and the version of TensorRT that it was built with, so build where you serve. A
    released policy takes minutes and as much memory as torch needs for it.

    Example: policy-server export tensorrt models/zoo/meta-world -o plans --precision f16 --max-batch 16
    """
    if batch > max_batch:
        raise typer.BadParameter(f"{batch} is more than --max-batch {max_batch}", param_hint="--batch")
    log(verbose=False)
    if graphs_only:
        or_explain(_export_graphs, bundle, output, precision, observations, samples, tolerance)
        return

    def build() -> None:
        try:
            from policy_server.export.plans import Batch, BuildOptions
            from policy_server.export.tensorrt import export_plans
        except ImportError as error:
            raise EngineNotInstalled(
                f"TensorRT plans cannot be built here ({error}): pip install 'robot-policy-server[tensorrt]' beside a "
                "torch for CUDA, or use NVIDIA's container of TensorRT; --graphs-only goes as far as possible without"
            ) from error
        report = export_plans(
            bundle,
            output,
            BuildOptions(precision, Batch(1, 1, 1), level, workspace_mb << 20, version_compatible),
            robots=batch,
            max_robots=max_batch,
            observations=observations,
            samples=samples,
            tolerance=tolerance,
            cache=cache,
        )
        typer.echo(f"golden drift {report.drift:.1e}, {report.chunk_ms:.2f} ms a chunk")
        typer.echo(f"{output / report.policy} holds {len(report.graphs)} plans; see report.md there")

    or_explain(build)


def _export_graphs(
    path: Path,
    output: Path,
    precision: Literal["f32", "f16", "bf16", "fp8", "int8"],
    observations: Path | None,
    samples: int,
    tolerance: float | None,
) -> None:
    from policy_server.bundle import load_bundle
    from policy_server.errors import GoldenDrift
    from policy_server.export.lowered import lower_bundle, onnx_drift, write_graphs
    from policy_server.export.operators import SUPPORTED_BY, check_operators

    bundle = load_bundle(path)
    low = lower_bundle(bundle, precision, observations=observations, samples=samples, tolerance=tolerance)
    if low.drift > low.tolerance:
        raise GoldenDrift(bundle.name, f"eager torch in {precision}", low.drift, low.tolerance)
    graphs = write_graphs(low.graphs, output / bundle.name)
    check_operators(graphs.values())
    drift = onnx_drift(bundle, graphs, precision)
    elsewhere = f"{drift:.1e} in ONNX Runtime" if drift is not None else "ONNX Runtime has no bfloat16 products on CPUs"
    if low.moved:
        typer.echo(f"recorded observations: actions move by {low.moved[0]:.1e} on average, {low.moved[1]:.1e} at most")
    typer.echo(f"golden drift {low.drift:.1e} in eager torch, {elsewhere}; allowed is {low.tolerance:.1e}")
    typer.echo(f"{output / bundle.name} holds {', '.join(graphs)}: every operator is one that {SUPPORTED_BY} supports")
