"""The command line: `policy-server serve`, `check`, `import`."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from policy_server import __version__
from policy_server.bundle import find_bundles, load_bundle
from policy_server.errors import EngineNotInstalled, StartupError

app = typer.Typer(
    name="policy-server",
    help="Serve robot policies: observations in, action chunks out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Bundles = Annotated[
    list[Path],
    typer.Argument(help="Bundle folders, or folders full of bundles.", metavar="BUNDLE...", show_default=False),
]
EngineName = Annotated[
    str,
    typer.Option(help='"auto" (the fastest that reproduces the golden case), onnx, openvino, openvino-bf16 or torch.'),
]
Threads = Annotated[
    int, typer.Option(min=0, help="Threads per engine; 0 one for small networks, else what the engine likes.")
]


@app.command()
def serve(
    bundles: Bundles,
    engine: EngineName = "auto",
    threads: Threads = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8000,
    default: Annotated[str, typer.Option(help="The policy behind '/'; the first bundle unless named.")] = "",
    api_keys: Annotated[
        str,
        typer.Option(
            envvar="POLICY_SERVER_API_KEYS",
            help="Comma-separated keys. Prefer the environment variable: other users can see command lines.",
            show_default=False,
        ),
    ] = "",
    insecure: Annotated[bool, typer.Option(help="Allow an address beyond this machine without keys.")] = False,
    max_message_mb: Annotated[float, typer.Option(min=0.001, help="Largest message, in MiB.")] = 16,
    request_timeout_s: Annotated[float, typer.Option(min=0.001, help="Longest time for one chunk.")] = 10,
    queue_capacity: Annotated[int, typer.Option(min=1, help="Requests that may wait for one policy.")] = 64,
    drain_s: Annotated[float, typer.Option(min=0, help="Longest wait for running requests at shutdown.")] = 10,
    ignore_unknown_inputs: Annotated[
        bool, typer.Option(help="Ignore inputs that a policy does not have, instead of refusing them.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every connection.")] = False,
) -> None:
    """Serve policies to robots.

    Loads every bundle, replays its golden case, warms it up, and only then opens the port.

    Example: policy-server serve models/zoo --port 8000
    """
    from policy_server.gateway.server import serve as run
    from policy_server.settings import Settings

    _log(verbose)

    def start() -> None:
        settings = Settings(
            bundles=find_bundles(bundles),
            default_policy=default,
            engine=engine,
            threads=threads,
            host=host,
            port=port,
            api_keys=tuple(key.strip() for key in api_keys.split(",") if key.strip()),
            insecure=insecure,
            max_message_bytes=int(max_message_mb * (1 << 20)),
            queue_capacity=queue_capacity,
            request_timeout_s=request_timeout_s,
            drain_s=drain_s,
            ignore_unknown_inputs=ignore_unknown_inputs,
        )
        run(settings)

    _or_explain(start)


@app.command()
def check(
    bundles: Bundles,
    engine: Annotated[str, typer.Option(help="One engine; all that are installed unless named.")] = "",
    threads: Threads = 0,
) -> None:
    """Check bundles: digests, spec, and the golden case on every engine.

    Exits with status 1 if any bundle could not be served.

    Example: policy-server check models/zoo
    """
    from policy_server.catalog import load_engine
    from policy_server.engine.base import ENGINES

    _log(verbose=False)
    failures = 0
    for path in _or_explain(find_bundles, bundles):
        try:
            bundle = load_bundle(path)
        except StartupError as error:
            failures += 1
            typer.echo(f"{path}: {error}")
            continue
        typer.echo(f"{bundle.name} {bundle.manifest.version} ({bundle.manifest.family}), every file as published")
        for name in [engine] if engine else [n for n in ENGINES if ENGINES[n].precision in bundle.manifest.tolerance]:
            try:
                loaded = load_engine(bundle, name, threads)
            except StartupError as error:
                missing = isinstance(error, EngineNotInstalled) and not engine
                failures += not missing
                typer.echo(f"  {name:14} {'not installed' if missing else error}")
            else:
                typer.echo(f"  {name:14} golden drift {loaded.drift:.1e}, {loaded.chunk_ms:.2f} ms a chunk")
                loaded.engine.close()
    raise typer.Exit(1 if failures else 0)


imports = typer.Typer(no_args_is_help=True, help="Make a bundle of a published checkpoint.")
app.add_typer(imports, name="import")


@imports.command("beso")
def import_beso(
    checkpoint: Annotated[Path, typer.Argument(help="model_state_dict.pth, or the same as .safetensors.")],
    stats: Annotated[
        Path,
        typer.Option(
            help="JSON with 'state' and 'action', each with lists mean, std, min, max over the training data."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.")],
    config: Annotated[
        Path | None,
        typer.Option(help="The run's .hydra/config.yaml; looked for beside the checkpoint unless named."),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(help="Noise schedule. Upstream trains with exponential; its evaluate_*.yaml say linear."),
    ] = "exponential",
    step_s: Annotated[float, typer.Option(min=1e-4, help="Time between two actions of the robot.")] = 0.1,
    zero_goal: Annotated[
        str, typer.Option(help="Goal dimensions that are zeroed after scaling, such as 2,5,6,7,8,9 for block push.")
    ] = "",
    licence: Annotated[str, typer.Option(help="SPDX identifier of the weights' licence.")] = "MIT",
) -> None:
    """Make a bundle of a public BESO checkpoint.

    BESO stores no scaler, so the statistics of its training data must come with it.

    Example: policy-server import beso c_beso_1/model_state_dict.pth --stats push.json --zero-goal 2,5,6,7,8,9 -o push
    """
    from policy_server.export.beso import import_checkpoint

    _log(verbose=False)
    try:
        dims = tuple(int(dim) for dim in zero_goal.split(",") if dim.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{zero_goal!r}, expected numbers such as 2,5,6") from error
    bundle = _or_explain(
        import_checkpoint,
        checkpoint,
        statistics=stats,
        hydra_config=config or checkpoint.parent / ".hydra" / "config.yaml",
        output=output,
        schedule=schedule,
        step_s=step_s,
        zeroed_goal_dims=dims,
        licence=licence,
    )
    typer.echo(f"{output} holds {bundle.name!r}; try: policy-server check {output}")


@app.command()
def hold(
    output: Annotated[Path, typer.Argument(help="Folder of the new bundle; its name is the policy's.")],
    joints: Annotated[str, typer.Option(help="Names of the joints, comma-separated, or how many there are.")] = "6",
    unit: Annotated[str, typer.Option(help="Unit of every joint.")] = "rad",
    camera: Annotated[
        list[str] | None, typer.Option(help="A camera as name:WIDTHxHEIGHT; may be given several times.")
    ] = None,
    horizon: Annotated[int, typer.Option(min=1, help="Actions in a chunk.")] = 16,
    step_s: Annotated[float, typer.Option(min=1e-4, help="Time between two actions.")] = 0.05,
) -> None:
    """Make a bundle that keeps a robot where it is.

    For wiring up a robot before its policy exists: real cameras, real shapes, real checks, and no motion.

    Example: policy-server hold my-robot --joints 14 --camera top:224x224 --camera wrist:224x224
    """
    from policy_server.export.hold import make_hold_bundle

    names = [f"joint_{i}" for i in range(int(joints))] if joints.isdigit() else [n.strip() for n in joints.split(",")]
    bundle = _or_explain(
        make_hold_bundle, output, joints=names, unit=unit, cameras=camera or (), horizon=horizon, step_s=step_s
    )
    typer.echo(f"{output} holds {bundle.name!r}; try: policy-server serve {output}")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


P = ParamSpec("P")
R = TypeVar("R")


def _or_explain(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function`; what the user can mend is said in one line, without a traceback."""
    try:
        return function(*args, **kwargs)
    except StartupError as error:
        # Some libraries explain themselves in many lines.
        typer.secho(f"policy-server: {' '.join(str(error).split())}", fg="red", err=True)
        raise typer.Exit(2) from error


def _log(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    if not verbose:
        # uvicorn announces every connection on the same logger as its errors.
        logging.getLogger("uvicorn.error").addFilter(lambda record: "WebSocket" not in record.getMessage())
