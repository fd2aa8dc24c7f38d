"""Decides which versions of which models a Triton server has loaded. Blocking; not for the way of an observation."""

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from policy_server.errors import EngineUnavailable

_PROBE_S = 1.0
# Loading compiles and replays; a released policy takes minutes.
_LOAD_S = 600.0


class ModelControl:
    """The model repository of one Triton server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = InferenceServerClient(url)

    def wait(self, timeout_s: float) -> None:
        """Wait until the server lives; raises EngineUnavailable."""
        until_s = time.monotonic() + timeout_s
        while True:
            try:
                if self.client.is_server_live(client_timeout=_PROBE_S):
                    return
                reason = "it says that it is not live"
            except InferenceServerException as error:
                reason = error.message()
            if time.monotonic() > until_s:
                raise EngineUnavailable(
                    f"no Triton server answers at {self.url} ({reason}). Start one with `make serve-triton`, or name "
                    "its gRPC address with --triton-url"
                )
            time.sleep(0.1)

    def load(self, policy: str, versions: Iterable[int]) -> Mapping[str, str]:
        """Have `versions` of a policy's models loaded, and no others; return the parameters of its entry model.

        Versions that are loaded already go on answering. A model that fails its golden case does not load.

        Raises:
            EngineUnavailable: The server cannot load one; the message holds its reason.
        """
        model = policy
        try:
            names = {entry["name"] for entry in self._index()}
            if policy not in names:
                raise InferenceServerException(
                    "its repository has no such model; `policy-server export triton` writes one"
                )
            # The entry model replays the golden case while it loads, so the graphs that it asks come first.
            for model in (*sorted(name for name in names if name.startswith(f"{policy}@")), policy):
                self._load(model, sorted(versions))
            parameters = self._config(policy).get("parameters", {})
        except InferenceServerException as error:
            reason = error.message().partition("\n\nAt:")[0]  # after that come the places in its Python files
            raise EngineUnavailable(f"Triton at {self.url} cannot load {model!r}: {reason}") from error
        return {name: value["string_value"] for name, value in parameters.items()}

    def unload(self, policy: str) -> None:
        """Unload a policy's own model; raises EngineUnavailable."""
        try:
            self.client.unload_model(policy, client_timeout=_LOAD_S)
        except InferenceServerException as error:
            raise EngineUnavailable(f"Triton at {self.url} cannot unload {policy!r}: {error.message()}") from error

    def _config(self, model: str) -> dict[str, Any]:
        config: dict[str, Any] = self.client.get_model_config(model, as_json=True, client_timeout=_LOAD_S)["config"]
        return config

    def _load(self, model: str, versions: list[int]) -> None:
        if not self.client.is_model_ready(model, client_timeout=_LOAD_S):
            self.client.load_model(model, client_timeout=_LOAD_S)  # the latest: its configuration is on the server
        if self._ready(model) != versions:
            config = self._config(model)
            config["version_policy"] = {"specific": {"versions": versions}}
            self.client.load_model(model, config=json.dumps(config), client_timeout=_LOAD_S)
        if missing := set(versions) - set(self._ready(model)):
            raise InferenceServerException(
                f"its repository has no version {', '.join(map(str, missing))} of it; "
                "`policy-server export triton` writes one"
            )

    def _ready(self, model: str) -> list[int]:
        return sorted(int(e["version"]) for e in self._index() if e["name"] == model and e.get("state") == "READY")

    def _index(self) -> list[dict[str, str]]:
        index = self.client.get_model_repository_index(as_json=True, client_timeout=_LOAD_S)
        entries: list[dict[str, str]] = index.get("models", [])
        return entries
