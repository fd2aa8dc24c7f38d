"""The command `policy-server doctor`."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from policy_server import __version__
from policy_server.doctor.finding import LEVELS, Finding, worst

if TYPE_CHECKING:
    from policy_server.doctor.examination import Patient

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}
_WIDTH = max(map(len, LEVELS))


def doctor(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(help="Bundle folders, or folders full of bundles.", metavar="[BUNDLE]...", show_default=False),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port that the server is to listen on.")] = 8000,
    triton: Annotated[
        str, typer.Option(help="gRPC address of a Triton server to look at, as host:port.", show_default=False)
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Examine this machine: can it serve policies, how well, and what should be done about it?

    Looks at the machine, its clocks, the port, optional parts of the installation, GPUs, a Triton server, every engine
    (each runs a tiny graph), and bundles (digests, and the golden case on each engine). Every check runs in a process
    of its own with a limit of time. Exits with status 1 if there is a problem.

    Example: policy-server doctor models/zoo --port 8000 --triton 127.0.0.1:8001
    """
    from policy_server.doctor.examination import Patient

    patient = Patient(bundles or (), port, triton)
    findings: list[Finding] = []
    subject = ""
    for finding in _examine(patient):
        findings.append(finding)
        if as_json:
            continue
        if finding.subject != subject:
            subject = finding.subject
            typer.secho(f"\n{subject}", bold=True)
        _print(finding)
    verdict = worst(findings)
    if as_json:
        report = {"version": __version__, "worst": verdict, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(report, indent=2))
    else:
        counts = Counter(finding.level for finding in findings)
        typer.echo("\n" + ", ".join(f"{counts[level]} {_plural(level, counts[level])}" for level in LEVELS))
    raise typer.Exit(1 if verdict == "problem" else 0)


def _examine(patient: "Patient") -> Iterator[Finding]:
    """Examine with a bar of progress, where somebody looks."""
    from policy_server.doctor.examination import examine

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        # Findings go to a pipe or a file as they are.
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        task = bar.add_task("", total=None)
        done = 0

        def doing(what: str, left: int) -> None:
            nonlocal done
            bar.update(task, description=what, completed=done, total=done + left)
            done += 1

        yield from examine(patient, doing)


def _print(finding: Finding) -> None:
    level = typer.style(f"{finding.level:{_WIDTH}}", fg=_COLOURS[finding.level])
    typer.echo(f"  {level}  {finding.what}")
    if finding.do:
        typer.echo(f"  {'':{_WIDTH}}  -> {finding.do}")


def _plural(level: str, count: int) -> str:
    return level if level == "ok" or count == 1 else f"{level}s"
