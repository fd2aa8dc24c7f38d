"""The command `policy-server evaluate`."""

import contextlib
import importlib.util
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from policy_server.bundle import Bundle, find_bundles, load_bundle
from policy_server.console import log, or_explain
from policy_server.errors import StartupError

if TYPE_CHECKING:
    from policy_sim.simulators import Simulator


def evaluate(
    path: Annotated[Path, typer.Argument(help="A bundle, or a folder of bundles.", show_default=False)],
    policy: Annotated[str, typer.Option(help="Which bundle of a folder.", show_default=False)] = "",
    simulator: Annotated[str, typer.Option(help="Which simulator; the one that fits unless named.")] = "",
    server: Annotated[
        str, typer.Option(help="A server that has the policy, as ws://HOST:PORT; one is started unless named.")
    ] = "",
    api_key: Annotated[
        str, typer.Option(envvar="POLICY_SERVER_API_KEY", help="For --server.", show_default=False)
    ] = "",
    episodes: Annotated[int, typer.Option(min=1, help="How many episodes.")] = 100,
    parallel: Annotated[int, typer.Option(min=1, help="Episodes at the same time.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the first episode; the others count on from it.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every episode and the summary here.", show_default=False)
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report with plots here.", show_default=False)
    ] = None,
) -> None:
    """Measure how often a policy succeeds in its simulator, over the network.

    If the server goes away on the way, or you interrupt, what was measured so far is written all the same, and the
    exit status is 1.

    Example: policy-server evaluate models/zoo/point-maze --html report.html
    """
    log(verbose=False)
    _require_simulators()
    bundle = or_explain(_choose, path, policy)
    world = or_explain(_simulator, bundle, simulator)
    for file in (json_file, html_file):
        or_explain(_require_folder, file)

    from policy_sim.evaluate import evaluate as run
    from policy_sim.evaluation import Evaluation
    from policy_sim.evaluation_report import write_report

    evaluation = Evaluation(bundle.name, bundle.manifest.version, world.name, episodes, seed, parallel)
    with _terminated_as_interrupted(), _address(server, bundle) as address:
        url = f"{address.rstrip('/')}/v1/policies/{bundle.name}/openpi"
        run(evaluation, world, url, api_key=api_key or None)
    summary = evaluation.summary()
    if json_file is not None:
        json_file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if html_file is not None:
        write_report(evaluation, html_file)
    _print(summary)
    if evaluation.failure is not None:
        typer.secho(
            f"policy-server: {evaluation.failure}. {len(evaluation.results)} of {episodes} episodes came to their end.",
            fg="red",
            err=True,
        )
        raise typer.Exit(1)


def _require_simulators() -> None:
    missing = [name for name in ("mujoco", "matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        or_explain(_refuse, f"evaluate needs {', '.join(missing)}: install the extra `sim`")


def _choose(path: Path, policy: str) -> Bundle:
    bundles = [load_bundle(found) for found in find_bundles([path])]
    named = [bundle for bundle in bundles if policy in ("", bundle.name)]
    if len(named) != 1:
        names = ", ".join(bundle.name for bundle in bundles)
        wanted = f"no policy {policy!r}" if policy else "several policies; name one with --policy"
        raise StartupError(f"{path} holds {wanted}: {names}")
    return named[0]


def _simulator(bundle: Bundle, name: str) -> "Simulator":
    from policy_sim.simulators import simulator_for

    try:
        return simulator_for(bundle.manifest.spec, name)
    except ValueError as error:
        raise StartupError(f"{bundle.name}: {error}") from error


def _require_folder(file: Path | None) -> None:
    if file is not None and not file.absolute().parent.is_dir():
        raise StartupError(f"{file} cannot be written: there is no folder {file.absolute().parent}")


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does: results are written, and the server is not left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _address(server: str, bundle: Bundle) -> Iterator[str]:
    from policy_sim.local_server import local_server

    if server:
        yield server
        return
    with contextlib.ExitStack() as stack:
        yield or_explain(_start, stack, local_server(bundle.path))


def _start(stack: contextlib.ExitStack, server: contextlib.AbstractContextManager[str]) -> str:
    try:
        return stack.enter_context(server)
    except RuntimeError as error:
        raise StartupError(str(error)) from error


def _refuse(why: str) -> None:
    raise StartupError(why)


def _print(summary: dict[str, Any]) -> None:
    if summary["success"] is None:
        return
    for name, rate in {"success": summary["success"], **_many(summary["by_group"])}.items():
        low, high = rate["interval_95"]
        typer.echo(f"{name:24} {rate['rate']:8.1%}  [{low:.1%}, {high:.1%}]  of {rate['of']} episodes")
    for name, mean in summary["measures"].items():
        low, high = mean["interval_95"]
        typer.echo(f"{name:24} {mean['mean']:8.4g}  [{low:.4g}, {high:.4g}]  of {mean['of']} episodes")


def _many(groups: dict[str, Any]) -> dict[str, Any]:
    return groups if len(groups) > 1 else {}
