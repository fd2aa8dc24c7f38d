"""The command line: `policy-server serve`, `swap`, `check`, `import`, `export`, `compress`, `doctor`, `evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from policy_server import __version__
from policy_server.bundle import find_bundles, load_bundle
from policy_server.compress_cli import compress
from policy_server.console import log, or_explain
from policy_server.doctor_cli import doctor
from policy_server.engine.base import ENGINES, TRITON
from policy_server.errors import DeviceNotFound, EngineNotInstalled, StartupError
from policy_server.evaluate_cli import evaluate
from policy_server.export_cli import exports
from policy_server.import_cli import imports
from policy_server.swap_cli import swap

app = typer.Typer(
    name="policy-server",
    help="Serve robot policies: observations in, action chunks out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(imports, name="import")
app.add_typer(exports, name="export")

Bundles = Annotated[
    list[Path],
    typer.Argument(help="Bundle folders, or folders full of bundles.", metavar="BUNDLE...", show_default=False),
]
# What a machine need not have; other errors of an engine are faults.
_ABSENT: Mapping[type, str] = {EngineNotInstalled: "not installed", DeviceNotFound: "no device for it"}
Threads = Annotated[
    int, typer.Option(min=0, help="Threads per engine; 0 one for small networks, else what the engine likes.")
]


@app.command()
def serve(
    bundles: Bundles,
    engine: Annotated[
        str,
        typer.Option(
            help=f'"auto" (the fastest on this CPU that reproduces the golden case), {", ".join(ENGINES)}, or '
            f"{TRITON}: the policies run on a Triton server, see --triton-url."
        ),
    ] = "auto",
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
    admin_keys: Annotated[
        str,
        typer.Option(
            envvar="POLICY_SERVER_ADMIN_KEYS",
            help="Comma-separated keys that may also change what is served (policy-server swap).",
            show_default=False,
        ),
    ] = "",
    triton_url: Annotated[
        str, typer.Option(help="For --engine triton: gRPC addresses of the Triton servers, comma-separated.")
    ] = "127.0.0.1:8001",
    triton_wait_s: Annotated[float, typer.Option(min=0, help="Longest wait for Triton to come up.")] = 60,
    insecure: Annotated[bool, typer.Option(help="Allow an address beyond this machine without keys.")] = False,
    max_message_mb: Annotated[float, typer.Option(min=0.001, help="Largest message, in MiB.")] = 16,
    request_timeout_s: Annotated[float, typer.Option(min=0.001, help="Longest time for one chunk.")] = 10,
    queue_capacity: Annotated[int, typer.Option(min=1, help="Requests that may wait for one policy.")] = 64,
    continuity: Annotated[
        Literal["replace", "rtc", "ensemble", "warm"],
        typer.Option(help="How chunks go on from one another where the robot does not say, see docs/stream.md."),
    ] = "replace",
    guard_mode: Annotated[
        Literal["clamp", "refuse"],
        typer.Option(help="What happens to a chunk that breaks a limit, see docs/safety.md."),
    ] = "clamp",
    guard_fallback: Annotated[
        Literal["refuse", "last_good", "hold"], typer.Option(help="What a robot gets in place of a chunk withheld.")
    ] = "refuse",
    stream_grace_s: Annotated[
        float, typer.Option(min=0, help="How long a streaming session waits for a robot whose connection broke.")
    ] = 30,
    stream_capacity: Annotated[int, typer.Option(min=1, help="Streaming sessions at the same time.")] = 1024,
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

    log(verbose)

    def start() -> None:
        settings = Settings(
            bundles=find_bundles(bundles),
            default_policy=default,
            engine=engine,
            threads=threads,
            host=host,
            port=port,
            triton_urls=_listed(triton_url),
            triton_wait_s=triton_wait_s,
            api_keys=_listed(api_keys),
            admin_keys=_listed(admin_keys),
            insecure=insecure,
            max_message_bytes=int(max_message_mb * (1 << 20)),
            queue_capacity=queue_capacity,
            continuity=continuity,
            guard_mode=guard_mode,
            guard_fallback=guard_fallback,
            stream_grace_s=stream_grace_s,
            stream_capacity=stream_capacity,
            request_timeout_s=request_timeout_s,
            drain_s=drain_s,
            ignore_unknown_inputs=ignore_unknown_inputs,
        )
        run(settings)

    or_explain(start)


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

    log(verbose=False)
    failures = 0
    for path in or_explain(find_bundles, bundles):
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
                absent = None if engine else _ABSENT.get(type(error))
                failures += absent is None
                typer.echo(f"  {name:15} {absent or error}")
            else:
                typer.echo(f"  {name:15} golden drift {loaded.drift:.1e}, {loaded.chunk_ms:.2f} ms a chunk")
                loaded.engine.close()
    raise typer.Exit(1 if failures else 0)


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
    bundle = or_explain(
        make_hold_bundle, output, joints=names, unit=unit, cameras=camera or (), horizon=horizon, step_s=step_s
    )
    typer.echo(f"{output} holds {bundle.name!r}; try: policy-server serve {output}")


app.command()(compress)
app.command()(doctor)
app.command()(evaluate)
app.command()(swap)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
