"""The optional parts of an installation: which are missing, and what cannot be done without them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from policy_server.doctor.finding import Finding


@dataclass(frozen=True)
class Extra:
    """An extra of this distribution.

    Attributes:
        modules: What it installs, by the names that are imported.
        brings: What can be done with it.
    """

    modules: tuple[str, ...]
    brings: str


EXTRAS: Mapping[str, Extra] = {
    "gateway": Extra(("fastapi", "fastapi_offline", "uvicorn", "uvloop", "cv2", "tokenizers"), "policy-server serve"),
    "onnx": Extra(("onnxruntime",), "engine onnx, the reference"),
    "openvino": Extra(("openvino",), "engines openvino, openvino-bf16 and openvino-int8, the fastest on most CPUs"),
    "triton": Extra(("tritonclient", "grpc"), "policies on a Triton server (serve --engine triton)"),
    "torch": Extra(("torch", "transformers"), "engines torch and torch-cuda, for comparison and for GPUs"),
    "export": Extra(("torch", "onnx", "onnx_ir", "onnxscript", "scipy"), "policy-server import, export and compress"),
    "tensorrt": Extra(("tensorrt",), "policy-server export tensorrt"),
    "sim": Extra(("gymnasium_robotics", "mujoco"), "simulators and demos (policy_sim)"),
    "meta-world": Extra(("metaworld",), "the Meta-World simulator and its demo"),
    "bench": Extra(("matplotlib", "tqdm"), "python -m benchmarks"),
}
# Without it nothing can be served at all.
_NEEDED = "gateway"


def check_extras() -> Iterator[Finding]:
    """Look for what each extra installs, without importing it."""
    there = []
    for name, extra in EXTRAS.items():
        missing = [module for module in extra.modules if find_spec(module) is None]
        if missing:
            yield Finding(
                "extras",
                "problem" if name == _NEEDED else "note",
                f"without {', '.join(missing)} there is no {extra.brings}",
                f"pip install 'robot-policy-server[{name}]'",
            )
        else:
            there.append(name)
    if there:
        yield Finding("extras", "ok", f"installed: {', '.join(there)}")
