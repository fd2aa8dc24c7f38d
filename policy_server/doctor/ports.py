"""The port that a server would listen on: is it free, and if not, who has it?"""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from policy_server.doctor.finding import Finding

_ASK_S = 2.0
_LISTENING = "0A"  # how /proc/net/tcp writes the state


def check_port(port: int, root: Path) -> Iterator[Finding]:
    """Try to listen on a port of this machine; `root` is where /proc is found."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except PermissionError:
            yield _problem(
                f"port {port} is not for ordinary users", "take one from 1024 on: policy-server serve --port"
            )
        except OSError as error:
            yield _taken(port, root, error)
        else:
            yield Finding("ports", "ok", f"port {port} is free")


def _taken(port: int, root: Path, error: OSError) -> Finding:
    who = _who_listens(port, root)
    served = _policies(port)
    if served is not None:
        return Finding(
            "ports", "note", f"a policy server has port {port} already ({who}); {served}", "for another: --port"
        )
    return _problem(
        f"port {port} cannot be had ({error.strerror}): {who}", "stop it, or take another: policy-server serve --port"
    )


def _problem(what: str, do: str) -> Finding:
    return Finding("ports", "problem", what, do)


def _policies(port: int) -> str | None:
    """Return what a policy server at `port` serves; None if it is no policy server."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/policies", timeout=_ASK_S) as response:
            return f"it serves {', '.join(policy['name'] for policy in json.load(response))}"
    except urllib.error.HTTPError as error:
        try:
            known = json.load(error)["error"]["code"] == "unauthorized"
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return "it tells what it serves only to those who have a key" if known else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _who_listens(port: int, root: Path) -> str:
    sockets = {f"socket:[{inode}]" for inode in _listening(port, root)}
    for process in (root / "proc").glob("[0-9]*"):
        try:
            if any(str(link.readlink()) in sockets for link in (process / "fd").iterdir()):
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                return f"process {process.name}, {' '.join(words).strip()[:100]}"
        except OSError:
            continue  # it has ended, or belongs to somebody else
    return f"somebody else's process; sudo ss -ltnp 'sport = :{port}' names it"


def _listening(port: int, root: Path) -> Iterator[str]:
    for name in ("tcp", "tcp6"):
        try:
            lines = (root / "proc/net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *rest = line.split()
            if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                yield rest[5]
