"""The clocks: what times are measured with, what a sleep costs, whether the time of day is right."""

import ctypes
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

from policy_server.doctor.finding import Finding

_READS = 2000
_SLEEPS = 40
_SLEEP_S = 1e-3
# A 50 Hz loop that wakes later than this has lost a twentieth of its period.
_LATE_S = 1e-3
_COARSE_S = 1e-4
# Reading these leaves the processor, for microseconds.
_SLOW_SOURCES = ("hpet", "acpi_pm", "jiffies")
_UNSYNCHRONISED = 0x40  # STA_UNSYNC of adjtimex(2)


class _Timex(ctypes.Structure):
    """The beginning of adjtimex(2)'s structure, and room for the rest of it."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("frequency", ctypes.c_long),
        ("most_error_us", ctypes.c_long),
        ("error_us", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_long * 32),
    ]


def check_clock(root: Path) -> Iterator[Finding]:
    """Look at the clocks; `root` is where /sys is found."""
    yield _monotonic(root)
    yield _sleep()
    yield synchronisation(_status())


def _monotonic(root: Path) -> Finding:
    times_ns = [time.monotonic_ns() for _ in range(_READS)]
    read_ns = (times_ns[-1] - times_ns[0]) / (_READS - 1)
    steps_ns = [after - before for before, after in pairwise(times_ns) if after > before]
    step_ns = min(steps_ns, default=0)
    try:
        source = (root / "sys/devices/system/clocksource/clocksource0/current_clocksource").read_text().strip()
    except OSError:
        source = "an unknown source"
    what = f"the monotonic clock ({source}) moves in steps of {step_ns} ns or less, and takes {read_ns:.0f} ns to read"
    if source in _SLOW_SOURCES:
        return Finding("clock", "warning", what, "let the kernel use the CPU's counter: see dmesg | grep -i tsc")
    if not step_ns or step_ns > 1e9 * _COARSE_S:
        return Finding("clock", "warning", what, "times of stages will be too coarse to trust on this machine")
    return Finding("clock", "ok", what)


def _sleep() -> Finding:
    late_s = []
    for _ in range(_SLEEPS):
        started_at_s = time.monotonic()
        time.sleep(_SLEEP_S)
        late_s.append(time.monotonic() - started_at_s - _SLEEP_S)
    middle_ms, worst_ms = 1e3 * median(late_s), 1e3 * max(late_s)
    what = f"a sleep of 1 ms ends {middle_ms:.2f} ms late (median of {_SLEEPS}), {worst_ms:.2f} ms at worst"
    if median(late_s) > _LATE_S:
        return Finding("clock", "warning", what, "control loops on this machine will jitter; see what else runs on it")
    return Finding("clock", "ok", what)


def synchronisation(status: int | None) -> Finding:
    """Say whether the time of day is kept right, by the kernel's status bits; None if the kernel does not tell."""
    if status is None:
        return Finding("clock", "note", "whether the time of day is synchronised cannot be seen")
    if status & _UNSYNCHRONISED:
        return Finding(
            "clock",
            "warning",
            "the time of day is not synchronised: logs and recordings will not line up with those of robots. Chunks do "
            "not suffer: capture times are monotonic, and the stream measures the offset between the clocks",
            "start chrony or systemd-timesyncd here (on the host, for a container), and on the robots",
        )
    return Finding("clock", "ok", "the time of day is synchronised")


def _status() -> int | None:
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    asked = _Timex(modes=0)  # nothing is set
    return int(asked.status) if adjtimex(ctypes.byref(asked)) >= 0 else None
