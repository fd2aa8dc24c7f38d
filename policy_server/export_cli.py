"""The command line of `policy-server export`."""

from pathlib import Path
from typing import Annotated

import typer

from policy_server.console import log, or_explain
from policy_server.errors import EngineNotInstalled
from policy_server.tensorrt_cli import export_tensorrt

exports = typer.Typer(no_args_is_help=True, help="Write bundles for other servers.")


exports.command("tensorrt")(export_tensorrt)


@exports.command("triton")
def export_triton(
    bundles: Annotated[
        list[Path], typer.Argument(help="Bundle folders, or folders full of bundles.", metavar="BUNDLE...")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model repository.")] = Path("triton_repo"),
    target: Annotated[
        str,
        typer.Option(
            help="What runs the graphs. On a CPU, in Triton's Python backend: onnx, openvino, openvino-bf16 or "
            "openvino-int8. On a GPU: onnxruntime-gpu, or tensorrt with --plans."
        ),
    ] = "onnx",
    plans: Annotated[
        Path | None,
        typer.Option(help="For tensorrt: the folder that `policy-server export tensorrt` wrote.", show_default=False),
    ] = None,
    apart: Annotated[
        bool,
        typer.Option(
            "--apart",
            help="Make every graph a model of its own, POLICY@GRAPH, which the policy's model asks through Triton. "
            "Always so on a GPU; on a CPU it costs time at every denoising step, and lets clients call single graphs.",
        ),
    ] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Most robots that are answered together.")] = 16,
    instances: Annotated[int, typer.Option(min=1, help="Processes that answer for one policy.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Threads of a CPU engine; 0 lets its library choose.")] = 1,
) -> None:
    """Write a Triton model repository.

    Each policy becomes a model that takes an observation and returns a chunk, with the sampler loop beside the engine:
    one round trip for each chunk. Its configuration follows from the bundle's spec. A model replays the golden case
    when it is loaded, and does not load if it drifts. Versions of a policy lie beside each other.

    Example: policy-server export triton models/zoo -o triton_repo --target openvino
    """
    from policy_server.bundle import find_bundles, load_bundle

    log(verbose=False)

    def write() -> None:
        try:
            from policy_server.export.triton_config import layout_of
            from policy_server.export.triton_repo import export_policy
        except ImportError as error:
            raise EngineNotInstalled(
                f"a library is missing ({error}); pip install 'robot-policy-server[triton,export]'"
            ) from error
        for path in find_bundles(bundles):
            bundle = load_bundle(path)
            layout = layout_of(
                bundle, target, plans=plans, apart=apart, max_batch=max_batch, instances=instances, threads=threads
            )
            for folder in export_policy(bundle, output, layout):
                typer.echo(f"{folder} version {bundle.manifest.version}")

    or_explain(write)
