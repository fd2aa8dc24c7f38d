"""What the figures were measured on. Says nothing that identifies a machine."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_LIBRARIES = (
    "numpy",
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "uvicorn",
    "uvloop",
    "websockets",
    "msgpack",
)


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Return processor, cores, memory, versions, and how busy the machine is before anything is measured.

    Args:
        device: What computes, as torch calls it; a GPU is named too.
    """
    return {
        **({} if device == "cpu" else _gpu()),
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {_memory_gib():.0f} GiB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}, Python {platform.python_version()}",
        "libraries": ", ".join(f"{name} {found}" for name in _LIBRARIES if (found := _version(name))),
        "load before": f"{os.getloadavg()[0]:.1f} (one-minute average; 0 is an idle machine)",
    }


def _gpu() -> dict[str, str]:
    import torch

    return {"GPU": f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
