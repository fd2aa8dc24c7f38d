"""A Triton server: does it live, is it ready, and which models has it?"""

from collections import defaultdict
from collections.abc import Iterator

from policy_server.doctor.finding import Finding
from policy_server.errors import EngineUnavailable

_WAIT_S = 3.0


def check_triton(url: str) -> Iterator[Finding]:
    """Ask the Triton server whose gRPC address is `url`."""
    try:
        from tritonclient.utils import InferenceServerException

        from policy_server.engine.triton_control import ModelControl
    except ImportError as error:
        yield Finding(
            "triton",
            "problem",
            f"its client is not installed ({error})",
            "pip install 'robot-policy-server[triton]'",
        )
        return
    control = ModelControl(url)
    try:
        control.wait(_WAIT_S)
    except EngineUnavailable:
        yield Finding(
            "triton",
            "problem",
            f"nothing that speaks gRPC as Triton does answers at {url} within {_WAIT_S:g} s",
            "start one (make serve-triton), or name its gRPC address: host:port, without http://, usually port 8001",
        )
        return
    client = control.client
    try:
        about = client.get_server_metadata(as_json=True, client_timeout=_WAIT_S)
        ready = client.is_server_ready(client_timeout=_WAIT_S)
        index = client.get_model_repository_index(as_json=True, client_timeout=_WAIT_S)
    except InferenceServerException as error:
        yield Finding(
            "triton", "problem", f"{url} lives, but does not answer: {error.message()}", "look at its log; restart it"
        )
        return
    what = f"{about.get('name', 'a server')} {about.get('version', '')} at {url} lives"
    if ready:
        yield Finding("triton", "ok", f"{what} and is ready")
    else:
        yield Finding("triton", "warning", f"{what}, but is not ready", "wait for its models to load; look at its log")
    yield from models(index.get("models", []))


def models(entries: list[dict[str, str]]) -> Iterator[Finding]:
    """Say what state each model of a repository's index is in."""
    if not entries:
        yield Finding(
            "triton", "warning", "its repository holds no model", "policy-server export triton BUNDLES -o REPOSITORY"
        )
    ready: defaultdict[str, list[int]] = defaultdict(list)
    broken: set[str] = set()
    for entry in entries:
        name, reason = entry["name"], entry.get("reason", "")
        if entry.get("state") == "READY":
            ready[name].append(int(entry["version"]))
        elif reason and reason != "unloaded":
            broken.add(name)
            yield Finding(
                "triton",
                "problem",
                f"model {name!r} does not load: {' '.join(reason.split())[:300]}",
                "export the bundle anew with this version of policy-server: policy-server export triton",
            )
    asleep = sorted({entry["name"] for entry in entries} - set(ready) - broken)
    for name, versions in sorted(ready.items()):
        yield Finding("triton", "ok", f"model {name!r} is ready, version {', '.join(map(str, sorted(versions)))}")
    if asleep:
        yield Finding("triton", "note", f"not loaded until a gateway asks for them: {', '.join(asleep)}")
