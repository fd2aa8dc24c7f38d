"""All checks in their order, each in a process of its own and with a limit of time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from policy_server.doctor.apart import run_apart
from policy_server.doctor.bundles import bundles_below, check_servable, size_bytes
from policy_server.doctor.engines import ENGINE_CHECKS, check_choice
from policy_server.doctor.finding import Finding, worst
from policy_server.engine.base import ENGINES

_QUICK_S = 20.0
# The first import of torch from a slow disk.
_LIBRARY_S = 90.0
# Beside that, the slowest that a bundle is read, and that an engine loads and replays it.
_READ_BYTES_PER_S = 50e6
_REPLAY_BYTES_PER_S = 20e6

Doing = Callable[[str, int], None]


@dataclass(frozen=True)
class Patient:
    """What is examined.

    Attributes:
        bundles: Folders of bundles, or folders full of them.
        port: The port that a server would listen on.
        triton: The gRPC address of a Triton server; empty if there is none to look at.
    """

    bundles: Sequence[Path]
    port: int
    triton: str = ""


def examine(patient: Patient, doing: Doing) -> Iterator[Finding]:
    """Run every check, and yield findings as they are made.

    Args:
        patient: What to look at.
        doing: Called before each check with what it looks at, and with how many checks are still to come, this one
            among them, as far as is known.
    """
    bundles, findings = bundles_below(patient.bundles)
    fixed = [
        ("machine", (), _QUICK_S),
        ("clock", (), _QUICK_S),
        ("port", (str(patient.port),), _QUICK_S),
        ("extras", (), _QUICK_S),
        ("gpus", (), _LIBRARY_S),
        *([("triton", (patient.triton,), _QUICK_S)] if patient.triton else []),
    ]
    left = len(fixed) + len(ENGINE_CHECKS) + len(bundles) * (1 + len(ENGINES))

    def run(check: str, arguments: tuple[str, ...], limit_s: float) -> list[Finding]:
        nonlocal left
        doing(" ".join((check, *arguments)), left)
        left -= 1
        return run_apart(check, arguments, limit_s)

    for check, arguments, limit_s in fixed:
        yield from run(check, arguments, limit_s)
    engines = []
    for name in ENGINE_CHECKS:
        found = run("engine", (name,), _LIBRARY_S)
        yield from found
        if name in ENGINES and _is_well(found):
            engines.append(name)
    yield from check_choice(engines, patient.triton)
    # An engine that runs nothing at all would only fail again.
    left -= len(bundles) * (len(ENGINES) - len(engines))
    yield from findings
    for path in bundles:
        size = size_bytes(path)
        found = run("bundle", (str(path),), _QUICK_S + size / _READ_BYTES_PER_S)
        yield from found
        if not _is_well(found):
            left -= len(engines)
            continue
        reproduced = []
        for name in engines:
            found = run("golden", (str(path), name), _LIBRARY_S + size / _REPLAY_BYTES_PER_S)
            yield from found
            if found and _is_well(found):
                reproduced.append(name)
        yield from check_servable(path.name, reproduced)


def _is_well(findings: Sequence[Finding]) -> bool:
    return bool(findings) and worst(findings) == "ok"
