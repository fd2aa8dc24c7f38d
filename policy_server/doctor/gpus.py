"""The GPUs: what the driver sees, and what the libraries of engines see of it."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from policy_server.doctor.finding import Finding

_NVIDIA_SMI_S = 20.0
_NVIDIA = "0x10de"  # the vendor on the PCI bus
_DISPLAYS = ("0x0300", "0x0302")  # classes of PCI devices: display, and accelerator without one
_FIELDS = "name,driver_version,memory.total,memory.used"


def check_gpus(root: Path) -> Iterator[Finding]:
    """Look for NVIDIA GPUs; `root` is where /sys is found."""
    seen = list(_driver())
    yield from seen
    if any(finding.level == "ok" for finding in seen):
        yield from _libraries()
    elif not seen:
        yield _none(root)


def _driver() -> Iterator[Finding]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return
    asked = [command, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True)
    except subprocess.TimeoutExpired:
        yield Finding(
            "gpus",
            "problem",
            f"nvidia-smi does not answer within {_NVIDIA_SMI_S:g} s: the driver hangs",
            "see dmesg | grep -i xid, and restart the machine",
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stdout or error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        yield Finding(
            "gpus",
            "problem",
            f"nvidia-smi fails: {' '.join(said.split())}",
            "make driver and kernel module match: usually a restart after an update, or the driver installed anew",
        )
    else:
        for index, line in enumerate(filter(None, done.stdout.splitlines())):
            name, driver, total, used = (part.strip() for part in line.split(","))
            yield Finding("gpus", "ok", f"GPU {index}: {name}, driver {driver}, {used} of {total} MiB in use")


def _none(root: Path) -> Finding:
    if any(_is_nvidia(device) for device in (root / "sys/bus/pci/devices").glob("*")):
        return Finding(
            "gpus",
            "warning",
            "there is an NVIDIA GPU, but no driver to be seen (nvidia-smi is missing)",
            "install NVIDIA's driver; in a container, the Container Toolkit on the host, and docker run --gpus all",
        )
    return Finding("gpus", "ok", "no NVIDIA GPU: policies run on the CPU, where all that comes with the project fits")


def _is_nvidia(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == _NVIDIA and kind.startswith(_DISPLAYS)


def _libraries() -> Iterator[Finding]:
    """Say which libraries can use the GPUs; those that are not installed are said elsewhere."""
    try:
        import onnxruntime
    except ImportError:
        pass
    else:
        yield _usable(
            f"onnxruntime {onnxruntime.__version__}",
            "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
            "pip uninstall onnxruntime, then pip install 'robot-policy-server[onnx-cuda]'",
        )
    try:
        import torch
    except ImportError:
        pass
    else:
        yield _usable(
            f"torch {torch.__version__}",
            torch.cuda.is_available(),
            "install torch for CUDA: see https://pytorch.org/get-started/locally",
        )


def _usable(library: str, can: bool, do: str) -> Finding:
    if can:
        return Finding("gpus", "ok", f"{library} can use them")
    return Finding("gpus", "warning", f"{library} cannot use them", do)
