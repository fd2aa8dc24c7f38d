"""What every command does: say in one line what went wrong, and log what takes long."""

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from policy_server.errors import StartupError

P = ParamSpec("P")
R = TypeVar("R")


def or_explain(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function`; what the user can mend is said in one line, without a traceback."""
    try:
        return function(*args, **kwargs)
    except StartupError as error:
        # Some libraries explain themselves in many lines.
        typer.secho(f"policy-server: {' '.join(str(error).split())}", fg="red", err=True)
        raise typer.Exit(2) from error


def log(verbose: bool) -> None:
    """Log to standard error; with `verbose`, every connection too."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    if not verbose:
        # uvicorn announces every connection on the same logger as its errors.
        logging.getLogger("uvicorn.error").addFilter(lambda record: "WebSocket" not in record.getMessage())
