"""The command `policy-server swap`."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from policy_server.bundle import load_bundle
from policy_server.console import or_explain
from policy_server.errors import StartupError

# A released policy takes minutes to load and to replay.
_LOAD_S = 900.0


def swap(
    bundle: Annotated[Path, typer.Argument(help="Folder of the new bundle.", show_default=False)],
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str,
        typer.Option(envvar="POLICY_SERVER_ADMIN_KEY", help="An admin key of the server.", show_default=False),
    ] = "",
) -> None:
    """Replace a served policy by another version of it, while robots go on.

    The new bundle, whose name says which policy it replaces, is loaded, replayed and warmed beside the old one; if it
    cannot be served the old one stays. Then it takes new chunks. An episode that the policy remembers (a window of
    observations) ends on the version that it began with. The old version is unloaded when its last session lets go.

    With --engine triton, export the bundle into Triton's repository first, with a higher version.

    Example: policy-server swap point-maze-2
    """
    loaded = or_explain(load_bundle, bundle)
    typer.echo(f"loading {loaded.name} {loaded.manifest.version} beside the one that is served ...")
    done = or_explain(_ask, f"{url.rstrip('/')}/v1/policies/{loaded.name}", bundle.resolve(), key)
    typer.echo(
        f"{done['name']} {done['version']} answers on {done['engine']}: golden drift {done['golden_drift']:.1e}, "
        f"{done['chunk_ms']:.2f} ms a chunk"
    )
    if done["retiring"]:
        typer.echo(f"version {', '.join(done['retiring'])} is unloaded when its last session lets go")


def _ask(address: str, bundle: Path, key: str) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    body = json.dumps({"bundle": str(bundle)}).encode()
    request = urllib.request.Request(address, body, headers, method="PUT")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_LOAD_S) as response:  # noqa: S310
            done: dict[str, Any] = json.load(response)
            return done
    except urllib.error.HTTPError as error:
        raise StartupError(f"the server refused: {_reason(error.read())}") from error
    except (OSError, ValueError) as error:
        raise StartupError(f"no server answers at {address}: {error}") from error


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")
