"""What a container may use, by the control groups that it runs in: version 2, or version 1."""

from dataclasses import dataclass
from pathlib import Path

# Version 1 says "no limit" with the largest multiple of a page below 2^63.
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True)
class Limits:
    """What the groups of this process allow; None where they set no limit.

    Attributes:
        cores: Processor time per time, such as 1.5.
        memory_bytes: Memory.
        throttled: How often the group was made to wait because its processor time was used up.
    """

    cores: float | None
    memory_bytes: int | None
    throttled: int


def read_limits(root: Path) -> Limits:
    """Return the tightest limits of all groups that this process is in.

    Args:
        root: Where /proc and /sys are found.
    """
    cores: list[float] = []
    memory_bytes: list[int] = []
    throttled = 0
    for group in _groups(root, ""):
        quota, _, period_us = _text(group / "cpu.max").partition(" ")
        if quota.isdigit() and period_us.isdigit():
            cores.append(int(quota) / int(period_us))
        memory_bytes += _number(group / "memory.max")
        throttled = max(throttled, _throttled(group))
    for group in _groups(root, "cpu"):
        quota_us, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota_us and period:
            cores.append(quota_us[0] / period[0])
        throttled = max(throttled, _throttled(group))
    for group in _groups(root, "memory"):
        memory_bytes += [limit for limit in _number(group / "memory.limit_in_bytes") if limit < _UNLIMITED_BYTES]
    return Limits(min(cores, default=None), min(memory_bytes, default=None), throttled)


def _groups(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's group and those above it; "" is version 2."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        # A container sees its own group as the root, whatever the path says.
        mount = root / "sys/fs/cgroup" / controller
        folder = mount / path.lstrip("/")
        return [folder, *(above for above in folder.parents if above.is_relative_to(mount))]
    return []


def _throttled(group: Path) -> int:
    for line in _text(group / "cpu.stat").splitlines():
        name, _, count = line.partition(" ")
        if name == "nr_throttled":
            return int(count)
    return 0


def _number(path: Path) -> list[int]:
    text = _text(path)
    return [int(text)] if text.isdigit() else []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
