"""Which policies are loaded, each ready to serve: checked, replayed and warm."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from policy_models.program import Program
from policy_server.bundle import Bundle, load_bundle
from policy_server.engine.base import ENGINES, Engine
from policy_server.errors import (
    BundleInvalid,
    EngineNotInstalled,
    EngineUnavailable,
    GoldenDrift,
    StartupError,
    UnknownPolicy,
)
from policy_server.golden import GoldenCase, check_golden
from policy_server.runtime.policy import PolicyRuntime
from policy_server.settings import Settings

logger = logging.getLogger(__name__)

# Below this size of its graphs, a second thread gains a network under a tenth, and beside a busy neighbour it waits at
# every barrier: medians rise two- to threefold (docs/decisions.md).
_SMALL_BYTES = 32 << 20
_LARGE_BYTES = 256 << 20
_NEAR_TIE = 1.15


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that reproduced a bundle's golden case.

    Attributes:
        engine: The engine, warm.
        drift: How far it was off, as a fraction of the action range.
        chunk_ms: Median time for the golden chunk.
    """

    engine: Engine
    drift: float
    chunk_ms: float


@dataclass(frozen=True)
class LoadedPolicy:
    """A bundle, its engine, its runtime, and an observation that it answers."""

    bundle: Bundle
    loaded: LoadedEngine
    runtime: PolicyRuntime
    example: Mapping[str, Any]


class Catalog:
    """The loaded policies by name."""

    def __init__(self, policies: Mapping[str, LoadedPolicy], default: str) -> None:
        self._policies = dict(policies)
        self.default = default

    def __iter__(self) -> Iterator[LoadedPolicy]:
        return iter(self._policies.values())

    def __getitem__(self, name: str) -> LoadedPolicy:
        """Return a policy; raises UnknownPolicy."""
        try:
            return self._policies[name]
        except KeyError:
            raise UnknownPolicy(name, self._policies) from None

    def close(self) -> None:
        """Close every policy."""
        for policy in self:
            policy.runtime.close()


def load_catalog(settings: Settings) -> Catalog:
    """Load every bundle of the settings; raises StartupError if any of them cannot be served as asked."""
    policies: dict[str, LoadedPolicy] = {}
    for path in settings.bundles:
        bundle = load_bundle(path)
        if bundle.name in policies:
            raise BundleInvalid(
                f"two bundles are called {bundle.name!r}: {policies[bundle.name].bundle.path} and {path}"
            )
        policies[bundle.name] = load_policy(bundle, settings)
    default = settings.default_policy or next(iter(policies))
    if default not in policies:
        raise BundleInvalid(f"the default policy {default!r} is not among the loaded ones: {', '.join(policies)}")
    return Catalog(policies, default)


def load_policy(bundle: Bundle, settings: Settings) -> LoadedPolicy:
    """Make one bundle ready to serve."""
    started_at_s = time.monotonic()
    loaded = load_engine(bundle, settings.engine, settings.threads)
    runtime = PolicyRuntime(
        bundle.name,
        bundle.new_program(),
        loaded.engine,
        capacity=settings.queue_capacity,
        timeout_s=settings.request_timeout_s,
        ignore_unknown=settings.ignore_unknown_inputs,
    )
    logger.info(
        "%s %s on %s: golden drift %.1e, %.2f ms a chunk, ready in %.1f s",
        bundle.name,
        bundle.manifest.version,
        loaded.engine.name,
        loaded.drift,
        loaded.chunk_ms,
        time.monotonic() - started_at_s,
    )
    return LoadedPolicy(bundle, loaded, runtime, GoldenCase(bundle.path / "golden.npz").inputs())


def load_engine(bundle: Bundle, requested: str, threads: int) -> LoadedEngine:
    """Return the engine called `requested`; for "auto" the fastest that reproduces the golden case.

    Raises:
        EngineUnavailable: It is unknown, or its library is not installed.
        GoldenDrift: It does not reproduce the golden case within the bundle's tolerance.
    """
    case = GoldenCase(bundle.path / "golden.npz")
    if requested != "auto":
        return _load_one(bundle, case, requested, threads)
    rivals: list[LoadedEngine] = []
    refusals: list[StartupError] = []
    for name in _automatic(bundle):
        try:
            rivals.append(_load_one(bundle, case, name, threads))
        except (EngineUnavailable, GoldenDrift) as error:
            logger.info("%s: not using %s: %s", bundle.name, name, error)
            refusals.append(error)
        else:
            if bundle.size_bytes >= _LARGE_BYTES:
                break
    if not rivals:
        reasons = "; ".join(map(str, refusals)) or "its tolerance names no precision"
        raise EngineUnavailable(f"no engine can run {bundle.name!r} on this machine: {reasons}")
    fastest_ms = min(rival.chunk_ms for rival in rivals)
    # Among near equals the order of ENGINES decides, so that a restart does not change the arithmetic.
    best = next(rival for rival in rivals if rival.chunk_ms <= _NEAR_TIE * fastest_ms)
    for rival in rivals:
        if rival is not best:
            rival.engine.close()
    return best


def _automatic(bundle: Bundle) -> list[str]:
    """Return the engines that may be chosen for a bundle, in the order of preference."""
    names = [n for n, choice in ENGINES.items() if choice.automatic and choice.precision in bundle.manifest.tolerance]
    # A step of a large network waits for its weights, so half the bytes are half the time; trying all three would
    # take longer than the rest of the start, and three times the memory.
    return names if bundle.size_bytes < _LARGE_BYTES else names[::-1]


def _load_one(bundle: Bundle, case: GoldenCase, name: str, threads: int) -> LoadedEngine:
    if name not in ENGINES:
        raise EngineUnavailable(f"there is no engine {name!r}; there are: auto, {', '.join(ENGINES)}")
    try:
        engine = ENGINES[name].make(bundle, threads or _fitting_threads(bundle))
    except ImportError as error:
        extra = name.partition("-")[0]
        raise EngineNotInstalled(
            f"engine {name!r} is not installed ({error}); pip install 'robot-policy-server[{extra}]'"
        ) from error
    except StartupError:
        raise
    except Exception as error:  # every library has its own classes for a graph that it cannot read
        raise EngineUnavailable(f"engine {name!r} cannot load {bundle.name!r}: {error}") from error
    program = bundle.new_program()
    drift = check_golden(bundle.name, case, program, engine, bundle.manifest.tolerance)
    return LoadedEngine(engine, drift, _warm_up(program, case, engine))


def _fitting_threads(bundle: Bundle) -> int:
    """Return 1 for a small network, else 0: the library's own choice."""
    return 1 if bundle.size_bytes < _SMALL_BYTES else 0


def _warm_up(program: Program, case: GoldenCase, engine: Engine) -> float:
    times_ms: list[float] = []
    # Twenty chunks make a steady median; three must do for a network that takes seconds.
    while len(times_ms) < 3 or (len(times_ms) < 20 and sum(times_ms) < 1000):
        started_at_s = time.perf_counter()
        case.drift(program, engine)
        times_ms.append(1e3 * (time.perf_counter() - started_at_s))
    return median(times_ms)
