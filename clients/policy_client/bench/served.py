"""What a server says about a policy: the spec that observations are drawn from."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from policy_client.errors import ConnectFailed


@dataclass(frozen=True)
class ServedPolicy:
    """A policy as `GET /v1/policies/NAME` describes it.

    Attributes:
        name: The policy's name.
        version: Which version of it.
        engine: What computes it.
        spec: What it needs and gives: cameras, state, goal, horizon, step_s.
    """

    name: str
    version: str
    engine: str
    spec: Mapping[str, Any]

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> ServedPolicy:
        """Take what a server, or a file, says.

        Raises:
            ValueError: It holds no spec.
        """
        spec = described.get("spec")
        if not isinstance(spec, Mapping) or not {"horizon", "step_s"} <= spec.keys():
            raise ValueError("the description of the policy holds no 'spec' with 'horizon' and 'step_s'")
        name, version, engine = (str(described.get(key, "")) for key in ("name", "version", "engine"))
        return cls(name, version, engine, spec)


def fetch_policy(url: str, name: str | None, api_key: str | None, timeout_s: float = 10.0) -> ServedPolicy:
    """Ask a server for one of its policies; for its default policy if no name is given.

    Raises:
        ConnectFailed: Nobody answers, or with a refusal.
        ValueError: The answer is no description of a policy.
    """
    base = f"{http_base(url)}/v1/policies"
    if name is None:
        listed = _get(base, api_key, timeout_s)
        name = next((str(policy["name"]) for policy in listed if policy.get("default")), None)
        if name is None:
            raise ValueError(f"{base} names no default policy; name one with --policy")
    return ServedPolicy.of(_get(f"{base}/{quote(name, safe='')}", api_key, timeout_s))


def read_policy(path: Path) -> ServedPolicy:
    """Read a saved answer of `GET /v1/policies/NAME`, for servers that do not describe their policies.

    Raises:
        ValueError: The file holds no such answer.
    """
    return ServedPolicy.of(json.loads(path.read_text(encoding="utf-8")))


def http_base(url: str) -> str:
    """Return scheme and host of a server's url for HTTP.

    Raises:
        ValueError: The url is none of http, https, ws or wss.
    """
    return _base(url, {"http": "http", "ws": "http", "https": "https", "wss": "https"})


def websocket_base(url: str) -> str:
    """Return scheme and host of a server's url for websockets.

    Raises:
        ValueError: The url is none of http, https, ws or wss.
    """
    return _base(url, {"http": "ws", "ws": "ws", "https": "wss", "wss": "wss"})


def _base(url: str, schemes: Mapping[str, str]) -> str:
    parts = urlsplit(url)
    if parts.scheme not in schemes or not parts.netloc:
        raise ValueError(f"url is {url!r}, expected one such as http://127.0.0.1:8000 or wss://robots.example")
    return f"{schemes[parts.scheme]}://{parts.netloc}"


def _get(url: str, api_key: str | None, timeout_s: float) -> Any:
    headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the scheme was checked by http_base
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read(500).decode(errors="replace").strip()
        raise ConnectFailed(f"{url} answered HTTP {error.code}: {said}", status=error.code) from error
    except OSError as error:
        raise ConnectFailed(f"no policy server answers at {url}: {error}") from error
