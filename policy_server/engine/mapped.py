"""Gives back the memory of files that an engine has mapped and read, but will not read again."""

import ctypes
from pathlib import Path

_MADV_DONTNEED = 4


def give_back(file: Path) -> None:
    """Drop the pages of every mapping of `file` in this process; whoever reads them again gets them from the file.

    OpenVINO maps weights, packs them for the processor, and keeps the mapping: a network would take its size twice.
    The mappings are read-only, so nothing can be lost. Does nothing where there is no /proc.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    madvise = ctypes.CDLL(None).madvise
    for line in maps.read_text().splitlines():
        addresses, access, *_, name = line.split(None, 5)
        if name == str(file.resolve()) and access.startswith("r-"):
            first, last = (int(address, 16) for address in addresses.split("-"))
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)
