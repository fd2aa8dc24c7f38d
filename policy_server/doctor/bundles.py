"""The bundles: are they whole, and does each engine reproduce their golden case?"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from policy_server.bundle import Bundle, find_bundles, load_bundle
from policy_server.catalog import load_engine
from policy_server.doctor.finding import Finding
from policy_server.engine.base import ENGINES
from policy_server.errors import BundleCorrupt, DeviceNotFound, EngineNotInstalled, EngineUnavailable, StartupError

_MIB = 1 << 20


def check_bundle(path: Path) -> Iterator[Finding]:
    """Compare a bundle's files with their digests, and read what it says."""
    try:
        bundle = load_bundle(path)
    except BundleCorrupt as error:
        yield _problem(
            f"{path}: {error}", "get the bundle again, whole; whoever changed it on purpose publishes it anew"
        )
    except StartupError as error:
        yield _problem(f"{path}: {error}", "write it with this version of policy-server, or get it again")
    else:
        manifest = bundle.manifest
        yield Finding(
            "bundles",
            "ok",
            f"{bundle.name} {manifest.version} ({manifest.family}, format {manifest.format}): every "
            f"file as published, {size_bytes(path) / _MIB:.1f} MiB",
        )


def check_golden_case(path: Path, engine: str) -> Iterator[Finding]:
    """Replay a bundle's golden case on one engine; says nothing where the engine does not fit the bundle."""
    bundle = load_bundle(path)
    tolerance = bundle.manifest.tolerance.get(ENGINES[engine].precision)
    if tolerance is None:
        return
    try:
        loaded = load_engine(bundle, engine, threads=0)
    except (EngineNotInstalled, DeviceNotFound):
        return  # said of the engine already, once
    except EngineUnavailable as error:
        yield _refused(bundle, engine, f"cannot run: {error}")
    except StartupError as error:
        yield _refused(bundle, engine, str(error))
    else:
        loaded.engine.close()
        yield Finding(
            "bundles",
            "ok",
            f"{bundle.name} on {engine}: golden drift {loaded.drift:.1e}, tolerated {tolerance:.1e}; "
            f"{loaded.chunk_ms:.2f} ms a chunk",
        )


def check_servable(name: str, engines: Iterable[str]) -> Iterator[Finding]:
    """Say so if no engine that "auto" may choose is among those that reproduced the golden case."""
    automatic = [engine for engine, choice in ENGINES.items() if choice.automatic]
    if not set(engines) & set(automatic):
        yield _problem(
            f"{name}: none of {', '.join(automatic)} reproduces its golden case, so `policy-server serve` refuses it",
            "see the lines above; pip install 'robot-policy-server[onnx]' brings the reference engine",
        )


def bundles_below(paths: Iterable[Path]) -> tuple[list[Path], list[Finding]]:
    """Return the bundles among and below `paths`, and what is to be said of paths that hold none."""
    bundles: list[Path] = []
    findings: list[Finding] = []
    for path in paths:
        try:
            bundles += find_bundles([path])
        except StartupError as error:
            findings.append(_problem(str(error), "name a bundle's folder, or one that holds bundles"))
    return bundles, findings


def size_bytes(path: Path) -> int:
    """Return the size of all files of a bundle."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _refused(bundle: Bundle, engine: str, why: str) -> Finding:
    do = "serve takes another engine (--engine auto)" if ENGINES[engine].automatic else "serve with another --engine"
    return Finding("bundles", "warning", f"{bundle.name} on {engine}: {why}", do)


def _problem(what: str, do: str) -> Finding:
    return Finding("bundles", "problem", what, do)
