"""Which policies are served, each ready: checked, replayed and warm."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from policy_models.spec import SamplingOptions
from policy_server.bundle import Bundle, load_bundle
from policy_server.engine.base import ENGINES, TRITON, Engine
from policy_server.errors import (
    BundleInvalid,
    EngineNotInstalled,
    EngineUnavailable,
    GoldenDrift,
    NotInterchangeable,
    StartupError,
    SwapUnderWay,
    UnknownPolicy,
)
from policy_server.golden import GoldenCase, check_drift, check_golden
from policy_server.runtime.costs import Kind, measure, name_of, rows_of
from policy_server.runtime.fallbacks import FALLBACKS
from policy_server.runtime.guard import Guard
from policy_server.runtime.inference import Inference
from policy_server.runtime.observation import describe_inputs
from policy_server.runtime.policy import PolicyRuntime
from policy_server.runtime.scheduler import Scheduler
from policy_server.runtime.version import Version
from policy_server.settings import Settings

if TYPE_CHECKING:
    from policy_server.engine.triton import TritonServers

logger = logging.getLogger(__name__)

# Below this size of its graphs, a second thread gains a network under a tenth, and beside a busy neighbour it waits at
# every barrier: medians rise two- to threefold (docs/decisions.md).
_SMALL_BYTES = 32 << 20
_LARGE_BYTES = 256 << 20
_NEAR_TIE = 1.15

Loader = Callable[[Bundle], "LoadedPolicy"]


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
    """A bundle that is ready to serve.

    Attributes:
        bundle: The bundle.
        version: What answers.
        drift: How far it was off the golden case, as a fraction of the action range.
        chunk_ms: Median time for the golden chunk.
        example: An observation that it answers.
    """

    bundle: Bundle
    version: Version
    drift: float
    chunk_ms: float
    example: Mapping[str, Any]


class ServedPolicy:
    """A policy's name, the bundle behind it now, and its runtime, which outlives bundles."""

    def __init__(self, loaded: LoadedPolicy, runtime: PolicyRuntime) -> None:
        self.loaded = loaded
        self.runtime = runtime
        self.swapping = asyncio.Lock()

    @property
    def bundle(self) -> Bundle:
        """The bundle that takes new sessions."""
        return self.loaded.bundle


class Catalog:
    """The served policies by name."""

    def __init__(self, policies: Mapping[str, ServedPolicy], default: str, load: Loader) -> None:
        self._policies = dict(policies)
        self._load = load
        self.default = default

    def __iter__(self) -> Iterator[ServedPolicy]:
        return iter(self._policies.values())

    def __getitem__(self, name: str) -> ServedPolicy:
        """Return a policy; raises UnknownPolicy."""
        try:
            return self._policies[name]
        except KeyError:
            raise UnknownPolicy(name, self._policies) from None

    async def swap(self, name: str, path: Path) -> ServedPolicy:
        """Serve the bundle at `path` under `name`, once it is loaded, replayed and warm beside the one served now.

        No request fails meanwhile. The old bundle is unloaded when its last session lets go; see `PolicyRuntime.swap`.

        Raises:
            UnknownPolicy: There is nothing to swap.
            SwapUnderWay: Somebody else is at it.
            StartupError: The new bundle cannot be served, or not in place of the old one; the old one stays.
        """
        served = self[name]
        if served.swapping.locked():
            raise SwapUnderWay(name)
        async with served.swapping:
            loaded = await asyncio.to_thread(self._load_successor, served.bundle, path)
            served.runtime.swap(loaded.version)
            served.loaded = loaded
        return served

    def _load_successor(self, old: Bundle, path: Path) -> LoadedPolicy:
        bundle = load_bundle(path)
        check_interchangeable(old, bundle)
        return self._load(bundle)

    def close(self) -> None:
        """Close every policy."""
        for policy in self:
            policy.runtime.close()


def check_interchangeable(old: Bundle, new: Bundle) -> None:
    """Raise NotInterchangeable unless robots that are connected to `old` can go on with `new`."""
    for what, got, wanted in (
        ("name", new.name, old.name),
        ("set of inputs", describe_inputs(new.spec), describe_inputs(old.spec)),
        ("action", (new.spec.action.names, new.spec.action.units), (old.spec.action.names, old.spec.action.units)),
        ("horizon", new.spec.horizon, old.spec.horizon),
        ("step_s", new.spec.step_s, old.spec.step_s),
    ):
        if got != wanted:
            raise NotInterchangeable(old.name, what, got, wanted)


def load_catalog(settings: Settings) -> Catalog:
    """Load every bundle of the settings; raises StartupError if any of them cannot be served as asked."""
    load = _loader(settings)
    policies: dict[str, ServedPolicy] = {}
    for path in settings.bundles:
        bundle = load_bundle(path)
        if bundle.name in policies:
            raise BundleInvalid(
                f"two bundles are called {bundle.name!r}: {policies[bundle.name].bundle.path} and {path}"
            )
        loaded = load(bundle)
        runtime = PolicyRuntime(
            bundle.name,
            loaded.version,
            capacity=settings.queue_capacity,
            timeout_s=settings.request_timeout_s,
            continuity=settings.continuity,
        )
        policies[bundle.name] = ServedPolicy(loaded, runtime)
    default = settings.default_policy or next(iter(policies))
    if default not in policies:
        raise BundleInvalid(f"the default policy {default!r} is not among the loaded ones: {', '.join(policies)}")
    return Catalog(policies, default, load)


def _loader(settings: Settings) -> Loader:
    if settings.engine != TRITON:
        return lambda bundle: _load_here(bundle, settings)
    try:
        from policy_server.engine.triton import TritonServers
    except ImportError as error:
        raise EngineNotInstalled(
            f"engine {TRITON!r} is not installed ({error}); pip install 'robot-policy-server[triton]'"
        ) from error

    servers = TritonServers(settings.triton_urls)
    servers.wait(settings.triton_wait_s)
    return lambda bundle: _load_on_triton(bundle, servers, settings)


def _load_here(bundle: Bundle, settings: Settings) -> LoadedPolicy:
    started_at_s = time.monotonic()
    loaded = load_engine(bundle, settings.engine, settings.threads)
    program = bundle.new_program()
    case = GoldenCase(bundle.path / "golden.npz")
    costs = measure(case.calls(program, loaded.engine), loaded.engine)
    # Asked again, without what the program has remembered meanwhile, such as an instruction.
    costs.chunk = [(Kind(name_of(call), mixed=False), rows_of(call)) for call in case.calls(program, loaded.engine)]
    scheduler = Scheduler(bundle.name, program, loaded.engine, costs)
    return _ready(bundle, scheduler, loaded.engine.name, loaded.drift, loaded.chunk_ms, settings, started_at_s)


def _load_on_triton(bundle: Bundle, servers: "TritonServers", settings: Settings) -> LoadedPolicy:
    started_at_s = time.monotonic()
    case = GoldenCase(bundle.path / "golden.npz")
    inference = servers.load(bundle, case.observation())
    drift, chunk_ms = 0.0, 0.0
    try:
        for server in servers.up():
            ask = partial(inference.ask, server, case.observation(), SamplingOptions(case.seed))
            drift = max(drift, case.drift_of(ask().actions, bundle.spec))
            check_drift(bundle.name, TRITON, drift, inference.tolerance)
            chunk_ms = max(chunk_ms, _median_ms(ask))
        inference.chunk_s = 1e-3 * chunk_ms
    except StartupError:
        inference.retire()
        raise
    return _ready(bundle, inference, TRITON, drift, chunk_ms, settings, started_at_s)


def _ready(
    bundle: Bundle,
    inference: Inference,
    engine: str,
    drift: float,
    chunk_ms: float,
    settings: Settings,
    started_at_s: float,
) -> LoadedPolicy:
    logger.info(
        "%s %s on %s: golden drift %.1e, %.2f ms a chunk, ready in %.1f s",
        bundle.name,
        bundle.manifest.version,
        engine,
        drift,
        chunk_ms,
        time.monotonic() - started_at_s,
    )
    fallback = FALLBACKS[settings.guard_fallback]()
    version = Version(
        bundle.manifest.version,
        bundle.spec,
        inference,
        engine=engine,
        guard=Guard(bundle.name, bundle.spec, mode=settings.guard_mode, fallback=fallback),
        ignore_unknown=settings.ignore_unknown_inputs,
    )
    return LoadedPolicy(bundle, version, drift, chunk_ms, GoldenCase(bundle.path / "golden.npz").inputs())


def load_engine(bundle: Bundle, requested: str, threads: int) -> LoadedEngine:
    """Return the engine called `requested`; for "auto" the fastest that reproduces the golden case.

    Raises:
        EngineUnavailable: It is unknown, or its library or its device is missing.
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
        raise EngineNotInstalled(
            f"engine {name!r} is not installed ({error}); pip install 'robot-policy-server[{ENGINES[name].extra}]'"
        ) from error
    except StartupError:
        raise
    except Exception as error:  # every library has its own classes for a graph that it cannot read
        raise EngineUnavailable(f"engine {name!r} cannot load {bundle.name!r}: {error}") from error
    program = bundle.new_program()
    drift = check_golden(bundle.name, case, program, engine, bundle.manifest.tolerance)
    return LoadedEngine(engine, drift, _median_ms(partial(case.drift, program, engine)))


def _fitting_threads(bundle: Bundle) -> int:
    """Return 1 for a small network, else 0: the library's own choice."""
    return 1 if bundle.size_bytes < _SMALL_BYTES else 0


def _median_ms(answer: Callable[[], object]) -> float:
    """Warm up with the golden chunk, and return its median time."""
    times_ms: list[float] = []
    # Twenty chunks make a steady median; three must do for a network that takes seconds.
    while len(times_ms) < 3 or (len(times_ms) < 20 and sum(times_ms) < 1000):
        started_at_s = time.perf_counter()
        answer()
        times_ms.append(1e3 * (time.perf_counter() - started_at_s))
    return median(times_ms)
