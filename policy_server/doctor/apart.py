"""Runs one check in a process of its own, so that it can neither hang nor crash the others."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO

from policy_server.doctor.finding import Finding

_KILLED_S = 2.0


def run_apart(check: str, arguments: Sequence[str], limit_s: float) -> list[Finding]:
    """Run `python -m policy_server.doctor CHECK ARGUMENTS...`, and return what it found.

    A check that is not done after `limit_s`, or that dies, is a finding itself, after those that it had made till then.
    """
    # Nothing in the folder that one happens to be in may pass for a library.
    command = [sys.executable, "-P", "-m", "policy_server.doctor", check, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Files and not pipes: a pipe stays open as long as any grandchild, and a driver that hangs cannot be killed.
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=log, env=environment)
        try:
            died = _how_it_died(process.wait(limit_s), log)
        except subprocess.TimeoutExpired:
            died = f"was not done after {limit_s:g} s"
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_S)
        said.seek(0)
        findings = [Finding(**json.loads(line)) for line in said if line.endswith("\n")]
    if died:
        words = " ".join((check, *arguments))
        findings.append(
            Finding(SUBJECTS[check], "problem", f"the check `{words}` {died}", f"run it alone: {' '.join(command)}")
        )
    return findings


def say(finding: Finding, to: IO[str]) -> None:
    """Write one finding where `run_apart` reads it."""
    print(json.dumps(asdict(finding)), file=to, flush=True)


def _how_it_died(code: int, log: IO[str]) -> str:
    if code == 0:
        return ""
    log.seek(0)
    last = (log.read().strip().splitlines() or ["it said nothing"])[-1][:300]
    how = f"was killed by signal {-code}" if code < 0 else f"failed with status {code}"
    return f"{how}: {last}"


# What each check is about, for findings about the check itself.
SUBJECTS = {
    "machine": "machine",
    "clock": "clock",
    "extras": "extras",
    "engine": "engines",
    "gpus": "gpus",
    "triton": "triton",
    "port": "ports",
    "bundle": "bundles",
    "golden": "bundles",
}
