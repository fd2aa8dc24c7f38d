"""The `config.pbtxt` of every model in a Triton repository, from specs and graphs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from policy_server import kserve
from policy_server.bundle import Bundle
from policy_server.engine.base import ENGINES
from policy_server.errors import StartupError

_TYPES = {
    "float32": pb.TYPE_FP32,
    "uint8": pb.TYPE_UINT8,
    "int32": pb.TYPE_INT32,
    "int64": pb.TYPE_INT64,
    "text": pb.TYPE_STRING,
}


@dataclass(frozen=True)
class Target:
    """What runs the graphs inside Triton.

    Attributes:
        backend: The Triton backend of a graph that is a model of its own.
        engine: The engine that the Python backend hosts; empty for other backends.
    """

    backend: str
    engine: str = ""

    @property
    def is_gpu(self) -> bool:
        """Whether graphs must be models of their own, on a GPU."""
        return self.backend != "python"


# Guidance asks about two rows for one robot.
ROWS = 2
_HOSTED = ("onnx", "openvino", "openvino-bf16", "openvino-int8")
TARGETS: Mapping[str, Target] = {
    **{engine: Target("python", engine) for engine in _HOSTED},
    "onnxruntime-gpu": Target("onnxruntime"),
    "tensorrt": Target("tensorrt"),
}


@dataclass(frozen=True)
class Layout:
    """How the models of one policy are written.

    Attributes:
        target: What runs the graphs.
        precision: What they are computed in.
        tolerance: Drift from the golden case that is accepted, as a fraction of the action range.
        apart: Every graph is a model of its own, which the policy's model asks through Triton.
        max_batch: Most robots that are answered together.
        instances: Processes that answer for one policy.
        threads: Threads of a CPU engine; 0 lets its library choose.
        plans: For TensorRT: the folder with the plan of each graph.
    """

    target: Target
    precision: str
    tolerance: float
    apart: bool
    max_batch: int
    instances: int
    threads: int
    plans: Path | None = None


def layout_of(
    bundle: Bundle, name: str, *, plans: Path | None, apart: bool, max_batch: int, instances: int, threads: int
) -> Layout:
    """Return how a bundle is served by a target.

    Raises:
        BundleInvalid: The plans were not built from this bundle.
        StartupError: There is no such target, or the bundle does not tolerate its precision.
    """
    if name not in TARGETS:
        raise StartupError(f"there is no target {name!r}; there are: {', '.join(TARGETS)}")
    if (plans is None) == (name == "tensorrt"):
        raise StartupError("--plans goes with --target tensorrt; `policy-server export tensorrt` builds them")
    target = TARGETS[name]
    apart = (apart or target.is_gpu) and bool(bundle.graphs())
    if plans is not None and bundle.graphs():
        from policy_server.export.plans import read_plans  # reads graphs, which a gateway has no library for

        built = read_plans(plans / bundle.name)
        built.check(bundle)
        max_batch = min(max_batch, built.options.batch.max // ROWS)
        return Layout(
            target, built.options.precision, built.tolerance, apart, max_batch, instances, threads, plans / bundle.name
        )
    precision = ENGINES[target.engine].precision if target.engine and bundle.graphs() else "f32"
    if precision not in bundle.manifest.tolerance:
        named = ", ".join(bundle.manifest.tolerance) or "no precision"
        raise StartupError(f"{bundle.name!r} tolerates {named}, not {precision!r}, which is what {name!r} computes in")
    return Layout(target, precision, bundle.manifest.tolerance[precision], apart, max_batch, instances, threads)


def graph_model(policy: str, graph: str) -> str:
    """Return the name of the model that is one graph of a policy."""
    return f"{policy}@{graph}"


def entry_config(bundle: Bundle, layout: Layout, outputs: Mapping[str, Iterable[str]]) -> pb.ModelConfig:
    """Return the configuration of a policy's own model.

    Args:
        bundle: The policy.
        layout: How it is served.
        outputs: What each graph returns, where graphs are models of their own.
    """
    beginning = bundle.new_program().begin()
    ports = kserve.input_ports(bundle.spec, beginning)
    config = pb.ModelConfig(
        name=bundle.name,
        backend="python",
        max_batch_size=layout.max_batch,
        input=[_input(port) for port in ports],
        output=[
            pb.ModelOutput(name=port.name, data_type=_TYPES[port.kind], dims=port.shape)
            for port in kserve.output_ports(bundle.spec, beginning)
        ],
        instance_group=[pb.ModelInstanceGroup(count=layout.instances, kind=pb.ModelInstanceGroup.KIND_CPU)],
    )
    _serve_latest_in_batches(config)
    _set(
        config,
        precision=layout.precision,
        tolerance=repr(layout.tolerance),
        graphs="models" if layout.apart else "inside",
        engine=layout.target.engine,
        threads=str(layout.threads),
        gradients="false" if layout.apart or not bundle.gradients() else "true",
        **{f"outputs_{graph}": ",".join(names) for graph, names in outputs.items()},
    )
    # Where graphs are apart, the first request replays the golden case, and a warm-up that fails crashes some servers.
    for robots in () if layout.apart else sorted({1, layout.max_batch}):
        sample = config.model_warmup.add(name=f"golden case, {robots} at once", batch_size=robots)
        for port in ports:
            if not port.optional:
                warm = pb.ModelWarmup.Input(data_type=_TYPES[port.kind], dims=port.shape, input_data_file=port.name)
                sample.inputs[port.name].CopyFrom(warm)
    return config


def graph_config(policy: str, graph: Path, layout: Layout) -> pb.ModelConfig:
    """Return the configuration of the model that is one graph, of an ONNX file."""
    inputs, outputs = graph_ports(graph)
    on_gpu = layout.target.is_gpu
    config = pb.ModelConfig(
        name=graph_model(policy, graph.stem),
        backend=layout.target.backend,
        max_batch_size=ROWS * layout.max_batch,
        input=[_input(port) for port in inputs],
        output=[pb.ModelOutput(name=p.name, data_type=_TYPES[p.kind], dims=p.shape) for p in outputs],
        instance_group=[
            pb.ModelInstanceGroup(
                count=1, kind=pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU
            )
        ],
    )
    _serve_latest_in_batches(config)
    if not on_gpu:
        _set(config, engine=layout.target.engine, threads=str(layout.threads))
    return config


def graph_ports(graph: Path) -> tuple[tuple[kserve.Port, ...], tuple[kserve.Port, ...]]:
    """Return what an ONNX graph takes and returns, without the row axis."""
    import onnx_ir as ir

    def ports(values: Iterable[ir.Value]) -> tuple[kserve.Port, ...]:
        found = []
        for value in values:
            assert value.name is not None and value.dtype is not None and value.shape is not None, "exported here"
            shape = tuple(length if isinstance(length, int) else -1 for length in tuple(value.shape)[1:])
            kind: Any = value.dtype.numpy().name
            found.append(kserve.Port(value.name, kind, shape))
        return tuple(found)

    model = ir.load(graph)
    return ports(model.graph.inputs), ports(model.graph.outputs)


def to_text(config: pb.ModelConfig) -> str:
    """Return a configuration as `config.pbtxt` has it."""
    return str(text_format.MessageToString(config))


def _input(port: kserve.Port) -> pb.ModelInput:
    tensor = pb.ModelInput(name=port.name, data_type=_TYPES[port.kind], dims=port.shape or (1,), optional=port.optional)
    if not port.shape:  # Triton has no inputs of rank 1 in a model with batches: a row is one number
        tensor.reshape.SetInParent()
    return tensor


def _serve_latest_in_batches(config: pb.ModelConfig) -> None:
    config.version_policy.latest.num_versions = 1
    # Plain: with queue policies a single instance stalls for half a second, so deadlines stay in the gateway.
    config.dynamic_batching.SetInParent()


def _set(config: pb.ModelConfig, **parameters: str) -> None:
    for name, value in parameters.items():
        config.parameters[name].string_value = value
