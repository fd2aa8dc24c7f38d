"""One check in this process, its findings in JSON, one a line: `python -m policy_server.doctor CHECK ARGUMENTS...`."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from policy_server.doctor.apart import say
from policy_server.doctor.finding import Finding

Check = Callable[..., Iterator[Finding]]
_ROOT = Path("/")


def main(check: str, *arguments: str) -> None:
    """Run one check."""
    # Libraries print what they like; that must not mix with findings.
    findings = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for finding in CHECKS[check](*arguments):
        say(finding, findings)


def _machine() -> Iterator[Finding]:
    from policy_server.doctor.machine import check_machine, usable_cores

    return check_machine(_ROOT, os.environ, usable_cores())


def _clock() -> Iterator[Finding]:
    from policy_server.doctor.clock import check_clock

    return check_clock(_ROOT)


def _extras() -> Iterator[Finding]:
    from policy_server.doctor.extras import check_extras

    return check_extras()


def _engine(name: str) -> Iterator[Finding]:
    from policy_server.doctor.engines import check_engine

    return check_engine(name)


def _gpus() -> Iterator[Finding]:
    from policy_server.doctor.gpus import check_gpus

    return check_gpus(_ROOT)


def _triton(url: str) -> Iterator[Finding]:
    from policy_server.doctor.triton import check_triton

    return check_triton(url)


def _port(port: str) -> Iterator[Finding]:
    from policy_server.doctor.ports import check_port

    return check_port(int(port), _ROOT)


def _bundle(path: str) -> Iterator[Finding]:
    from policy_server.doctor.bundles import check_bundle

    return check_bundle(Path(path))


def _golden(path: str, engine: str) -> Iterator[Finding]:
    from policy_server.doctor.bundles import check_golden_case

    return check_golden_case(Path(path), engine)


# Each imports what it needs when it is asked: a broken library is then the matter of one check.
CHECKS: Mapping[str, Check] = {
    "machine": _machine,
    "clock": _clock,
    "extras": _extras,
    "engine": _engine,
    "gpus": _gpus,
    "triton": _triton,
    "port": _port,
    "bundle": _bundle,
    "golden": _golden,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
