"""The machine: cores, memory, instruction sets, limits of a container, settings of threads."""

import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from policy_server.doctor.cgroup import Limits, read_limits
from policy_server.doctor.finding import Finding, Level

_GIB = 1 << 30
_LITTLE_MEMORY_GIB = 2.0
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# What the kernel calls instruction sets on x86-64 and on Arm.
_VECTORS = ("avx2", "asimd")
_FAST = {
    "float32 in 512 bits": ("avx512f", "sve"),
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"),
}


def check_machine(root: Path, environment: Mapping[str, str], cores: int) -> Iterator[Finding]:
    """Look at the machine.

    Args:
        root: Where /proc and /sys are found.
        environment: The environment variables that a server would start with.
        cores: How many cores this process may run on.
    """
    limits = read_limits(root)
    usable = min(float(cores), limits.cores or float(cores))
    yield from _cores(root, cores, limits)
    yield _load(root, usable)
    yield _memory(root, limits)
    yield from _instructions(root)
    yield from _threads(environment, usable)
    yield from _governor(root)


def _cores(root: Path, cores: int, limits: Limits) -> Iterator[Finding]:
    name = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    what = f"{name[1] if name else platform.machine()}, {cores} cores for this process"
    if limits.cores is None or limits.cores >= cores:
        yield _finding("ok" if cores > 1 else "warning", what, "" if cores > 1 else _ONE_CORE)
    else:
        yield _finding(
            "warning",
            f"{what}, but a control group gives it the time of {limits.cores:g}: engines start more threads than "
            "can run, and all of them are made to wait at once",
            f"serve with --threads {max(1, int(limits.cores))}, or give the container whole cores "
            f"(docker run --cpuset-cpus 0-{max(0, int(limits.cores) - 1)}) and not shares of time (--cpus)",
        )
    if limits.throttled:
        yield _finding(
            "warning",
            f"the control group was made to wait {limits.throttled} times for having used up its processor time; "
            "each shows as a late chunk",
            "raise the container's limit, or have fewer robots on it",
        )


_ONE_CORE = "give it two or more: the network thread and an engine wait for each other on one"


def _load(root: Path, usable: float) -> Finding:
    text = _text(root / "proc/loadavg").split()
    load = float(text[0]) if text else 0.0
    if load > usable:
        return _finding(
            "warning",
            f"busy: {load:g} threads ran or waited over the last minute, for the time of {usable:g} cores",
            "see what else runs here (top); chunks will be late and their times unsteady",
        )
    return _finding("ok", f"load {load:g} over the last minute, for {usable:g} cores")


def _memory(root: Path, limits: Limits) -> Finding:
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    total = int(sizes.get("MemTotal", 0)) * 1024 / _GIB
    free = int(sizes.get("MemAvailable", 0)) * 1024 / _GIB
    if not total:
        return _finding("note", "how much memory there is cannot be seen")
    what = f"{total:.1f} GiB of memory, {free:.1f} GiB of it available"
    if limits.memory_bytes is not None and limits.memory_bytes / _GIB < total:
        limit = limits.memory_bytes / _GIB
        what += f", limited to {limit:.1f} GiB by a control group"
        free = min(free, limit)
    if free < _LITTLE_MEMORY_GIB:
        return _finding("warning", what, "an engine needs up to three times the size of a bundle while it loads")
    return _finding("ok", what)


def _instructions(root: Path) -> Iterator[Finding]:
    text = _text(root / "proc/cpuinfo")
    line = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    if line is None:
        yield _finding("note", "which instructions the CPU has cannot be seen")
        return
    flags = set(line[1].split())
    if not flags & set(_VECTORS):
        yield _finding(
            "warning",
            "the CPU has neither AVX2 nor Arm's vectors: engines run many times slower, and some builds not at all",
            "on a virtual machine, pass the host's CPU on (such as -cpu host); else use a newer machine",
        )
    there = [f"{what} ({', '.join(has)})" for what, sets in _FAST.items() if (has := [s for s in sets if s in flags])]
    missing = [what for what, sets in _FAST.items() if not flags & set(sets)]
    if there:
        yield _finding("ok", f"instructions for {', '.join(there)}")
    if missing:
        yield _finding(
            "note",
            f"no instructions for {', '.join(missing)}: engines in such a precision gain little or nothing here",
        )


def _threads(environment: Mapping[str, str], usable: float) -> Iterator[Finding]:
    settings = {name: environment[name] for name in _THREAD_SETTINGS if environment.get(name)}
    if not settings:
        yield _finding("ok", "no environment variable sets threads: policy-server chooses (--threads)")
    for name, value in settings.items():
        if value.isdigit() and 0 < int(value) <= usable:
            yield _finding("note", f"{name}={value} limits torch and numpy; the other engines go by --threads")
        else:
            yield _finding(
                "warning",
                f"{name}={value}, for the time of {usable:g} cores",
                f"unset {name}: policy-server serve --threads is meant for that",
            )


def _governor(root: Path) -> Iterator[Finding]:
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    governors = sorted({_text(path).strip() for path in files} - {""})
    if not governors:
        yield _finding("ok", "the CPU's frequency is not governed here, as on most virtual machines")
    elif governors == ["performance"]:
        yield _finding("ok", "the CPU's frequency is governed for performance")
    else:
        yield _finding(
            "warning",
            f"the CPU's frequency is governed by {', '.join(governors)}: the first chunk after a pause is slower",
            "sudo cpupower frequency-set -g performance",
        )


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0))


def _finding(level: Level, what: str, do: str = "") -> Finding:
    return Finding("machine", level, what, do)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
