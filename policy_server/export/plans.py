"""TensorRT plans as files: what they were built from and for, where they lie, and whether they still fit a bundle.

No TensorRT here: plans are copied and checked on machines that cannot run them. `PLANS/<policy>/` holds `<graph>.plan`,
`plans.json`, which `read_plans` reads, and the build's `report.json` and `report.md`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir
from pydantic import TypeAdapter, ValidationError

from policy_models.spec import Precision
from policy_server.bundle import MANIFEST, Bundle, digest
from policy_server.errors import BundleInvalid

PLANS = "plans.json"
FORMAT = 1


@dataclass(frozen=True)
class Batch:
    """How many rows a plan takes: at least, what it is fastest for, and at most. Guidance needs two rows a robot."""

    min: int
    opt: int
    max: int

    @staticmethod
    def of(bundle: Bundle, *, robots: int, max_robots: int) -> "Batch":
        """Return the rows that a bundle needs for so many robots at once, typically and at most.

        A request may ask for guidance, so there must be room for two rows a robot; the policy's own default decides
        what is typical.
        """
        guided = bundle.spec.sampler is not None and bundle.spec.sampler.guidance not in (0, 1)
        return Batch(1, robots * (2 if guided else 1), max_robots * 2)


@dataclass(frozen=True)
class BuildOptions:
    """Everything that decides what a plan is, besides its graph and the machine.

    Attributes:
        precision: Of the graph; what TensorRT computes in follows from the graph's types alone.
        batch: Rows of the optimisation profile.
        level: TensorRT's builder optimisation level, 0 to 5.
        workspace_bytes: Scratch memory that a layer may use; 0 for all of the device.
        version_compatible: Whether later versions of TensorRT may load the plan.
    """

    precision: Precision
    batch: Batch
    level: int = 3
    workspace_bytes: int = 0
    version_compatible: bool = False


@dataclass(frozen=True)
class Machine:
    """What plans are built with, and which device they run on: no other."""

    tensorrt: str
    gpu: str
    compute_capability: str


@dataclass(frozen=True)
class Plans:
    """The plans of one bundle, as `plans.json` describes them.

    Attributes:
        format: Version of this file's format.
        policy: Name of the bundle.
        bundle_sha256: SHA-256 of its `policy.yaml`, which holds the digests of everything else.
        options: How they were built.
        tolerance: Drift from the golden case that they were accepted with, as a fraction of the action range.
        machine: What they run on.
        sha256: Of each plan, by graph.
    """

    __pydantic_config__ = {"extra": "forbid"}

    format: int
    policy: str
    bundle_sha256: str
    options: BuildOptions
    tolerance: float
    machine: Machine
    sha256: Mapping[str, str]

    def check(self, bundle: Bundle) -> None:
        """Raise BundleInvalid unless the plans were built from `bundle`, as it is now."""
        if self.bundle_sha256 != bundle.digest:
            raise BundleInvalid(
                f"the plans of {self.policy!r} were built from another bundle than {bundle.path}: its {MANIFEST} has "
                f"SHA-256 {bundle.digest[:16]}..., they are of {self.bundle_sha256[:16]}...; build them again"
            )
        if set(self.sha256) != set(bundle.graphs()):
            raise BundleInvalid(
                f"{bundle.name} has the graphs {', '.join(bundle.graphs())}, and plans of {', '.join(self.sha256)}"
            )


def write_plans(folder: Path, plans: Plans) -> None:
    """Write `plans.json` into the folder that holds the plans."""
    (folder / PLANS).write_text(json.dumps(asdict(plans), indent=1) + "\n", encoding="utf-8")


def read_plans(folder: Path) -> Plans:
    """Read the description of the plans in a folder, `PLANS/<policy>`, and check their bytes; see `Plans.check` too.

    Raises:
        BundleInvalid: There is none, it does not say what it must, or a plan is missing or another.
    """
    path = folder / PLANS
    try:
        plans = TypeAdapter(Plans).validate_json(path.read_bytes())
    except OSError as error:
        raise BundleInvalid(
            f"{folder} holds no plans: {PLANS} cannot be read ({error.strerror}); make some with "
            "'policy-server export tensorrt'"
        ) from error
    except ValidationError as error:
        details = error.errors()[0]
        raise BundleInvalid(f"{path}: {'.'.join(map(str, details['loc']))}: {details['msg']}") from error
    if plans.format != FORMAT:
        raise BundleInvalid(f"{path}: this server reads plans of format {FORMAT}, got {plans.format}")
    for graph, wanted in plans.sha256.items():
        if "/" in graph or graph.startswith("."):
            raise BundleInvalid(f"{path}: {graph!r} is no name of a graph")
        got = digest(plan_path(folder, graph))
        if got != wanted:
            raise BundleInvalid(f"{plan_path(folder, graph)} has SHA-256 {got[:16]}..., {PLANS} says {wanted[:16]}...")
    return plans


def plan_path(folder: Path, graph: str) -> Path:
    """Return where the plan of a graph lies."""
    return folder / f"{graph}.plan"


def profile(graph: Path, batch: Batch) -> Mapping[str, tuple[tuple[int, ...], ...]]:
    """Return (least, typical, largest) shape of every input of an ONNX file: the first axis is the batch.

    Raises:
        BundleInvalid: An axis other than the first has no fixed length.
    """
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
    for value in ir.load(graph).graph.inputs:
        rest = [length for length in (value.shape or ())[1:] if isinstance(length, int)]
        if value.shape is None or len(rest) + 1 != len(value.shape):
            raise BundleInvalid(
                f"{value.name!r} of the graph {graph.stem!r} has shape {value.shape}: only its first axis may vary"
            )
        shapes[str(value.name)] = tuple((rows, *rest) for rows in (batch.min, batch.opt, batch.max))
    return shapes


def cache_key(graph: Path, weights: Path, options: BuildOptions, machine: Machine) -> str:
    """Return the SHA-256 of everything that decides what a plan is: graph, weights, options, TensorRT and GPU."""
    described = {
        "format": FORMAT,
        "graph": digest(graph),
        "weights": digest(weights) if weights.exists() else "",
        "options": asdict(options),
        "machine": asdict(machine),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
