"""Everything that can compute a chunk of one bundle, and the processes they are timed in."""

import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from policy_models.program import Program
from policy_models.spec import Observation, SamplingOptions
from policy_server.bundle import Bundle, load_bundle
from policy_server.catalog import load_engine
from policy_server.engine.base import ENGINES, Engine
from policy_server.errors import EngineUnavailable
from policy_server.golden import draw_observation
from policy_server.runtime.sampling import drive

ONE_THREAD = ", 1 thread"
AUTO = "auto"
EAGER, EAGER_ONE = "eager torch", "eager torch" + ONE_THREAD
EAGER_SETTLED = "eager torch, routes settled"
EAGER_GPU = "eager torch on the GPU"
# Tolerances are meant for the golden case; the worst of several observations may lie further off.
_SAME = 5.0
_ANSWER_S = 300.0  # a policy of gigabytes may come from a slow disk


class Contender(Protocol):
    """One way from an observation to a chunk.

    Attributes:
        engine: What runs the network.
        precision: What it computes in.
    """

    engine: str
    precision: str

    def prepare(self) -> None:
        """Get ready for a block of chunks; not timed."""

    def chunk(self, observation: Observation, seed: int) -> np.ndarray:
        """Return the actions (H, A) of an episode's first observation."""


class EngineContender:
    """The bundle's program over one of this project's engines, as it is served."""

    def __init__(self, program: Program, engine: Engine) -> None:
        self.engine = engine.name
        self.precision = engine.precision
        self._program = program
        self._engine = engine

    def prepare(self) -> None:
        """Engines hold their threads; torch's belong to the process."""
        if self.engine == "torch":
            import torch

            from benchmarks.eager import DEFAULT_THREADS

            torch.set_num_threads(DEFAULT_THREADS)

    def chunk(self, observation: Observation, seed: int) -> np.ndarray:
        """Drive the program to its end."""
        dialogue = self._program.infer(observation, self._program.begin(), SamplingOptions(seed))
        actions: np.ndarray = drive(dialogue, self._engine).actions
        return actions


def contender_names(bundle: Bundle) -> list[str]:
    """Return the contenders of a CPU that a bundle allows, whether installed or not."""
    engines = [n for n, c in ENGINES.items() if c.precision in bundle.manifest.tolerance and c.device == "cpu"]
    served = [name + threads for name in engines if name != "torch" for threads in ("", ONE_THREAD)]
    return [AUTO, *served, "torch", EAGER, EAGER_ONE]


def make_contender(bundle: Bundle, name: str) -> Contender:
    """Return one of the contenders of `contender_names`, EAGER_SETTLED for a MoDE policy, or one of a GPU.

    Raises:
        ImportError: Its library is not installed.
    """
    if name == AUTO:
        return EngineContender(bundle.new_program(), load_engine(bundle, "auto", 0).engine)
    base, _, _ = name.partition(ONE_THREAD)
    threads = 1 if name.endswith(ONE_THREAD) else 0
    if base in ENGINES:
        return EngineContender(bundle.new_program(), ENGINES[base].make(bundle, threads))
    from benchmarks.eager import DEFAULT_THREADS, EagerTorch
    from benchmarks.eager_mode import EagerMode

    device = "cuda" if base == EAGER_GPU else "cpu"
    if device == "cuda":
        import torch

        # As the engines that it is compared with: left alone, convolutions are rounded to TensorFloat-32.
        torch.backends.cudnn.allow_tf32 = False
    if bundle.manifest.family == "mode":
        return EagerMode(bundle, threads or DEFAULT_THREADS, settled=base == EAGER_SETTLED, device=device)
    return EagerTorch(bundle, threads or DEFAULT_THREADS, device=device)


def check_equal(bundle: Bundle, workers: "Mapping[str, Worker]", yardstick: str, observations: int) -> dict[str, float]:
    """Return how far each contender is from the yardstick, as a fraction of the action's range.

    Raises:
        ValueError: One of them computes something else.
    """
    wanted = workers[yardstick].chunks(yardstick, 0, observations)
    action = bundle.spec.action
    span = np.subtract(action.high, action.low) if action.high and action.low else np.ptp(wanted, axis=(0, 1))
    drifts = {}
    for name, worker in workers.items():
        drifts[name] = float(np.max(np.abs(np.subtract(worker.chunks(name, 0, observations), wanted)) / span))
        engine = ENGINES.get(worker.engines[name])
        allowed = _SAME * bundle.manifest.tolerance[engine.precision if engine else "f32"]
        if not drifts[name] <= allowed:
            raise ValueError(f"{name} drifts {drifts[name]:.1e} from {yardstick}, {allowed:.1e} is allowed")
    return drifts


class Worker:
    """A process that holds some contenders and times blocks of their chunks. Ends with its context.

    Attributes:
        engines: What runs each contender's network, known once the context is entered.
    """

    engines: Mapping[str, str]

    def __init__(
        self, bundle: Path, names: Sequence[str], make: Callable[[Bundle, str], Contender] = make_contender
    ) -> None:
        self._bundle = bundle
        self._names = names
        self._make = make

    def __enter__(self) -> Self:
        """Start the process; raises ImportError if one of the contenders is not installed."""
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._bundle, self._names, self._make), daemon=True)
        self._process.start()
        theirs.close()
        self.engines = self._answer()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def time_block_ms(self, name: str, seed: int, count: int) -> list[float]:
        """Return the times of `count` chunks, after one more that is not timed."""
        times_ms: list[float] = self.ask(_time_ms, name, seed, count)
        return times_ms

    def chunks(self, name: str, seed: int, count: int) -> list[np.ndarray]:
        """Return `count` chunks; every contender is asked the same for the same seed."""
        chunks: list[np.ndarray] = self.ask(_chunks, name, seed, count)
        return chunks

    def ask(self, do: Callable[..., Any], name: str, *arguments: Any) -> Any:
        """Return `do(contender, bundle, *arguments)`, done in the worker's process."""
        self._pipe.send((do, name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(_ANSWER_S):
            raise TimeoutError(f"the process of {', '.join(self._names)} said nothing for {_ANSWER_S:g} s")
        answer = self._pipe.recv()
        if isinstance(answer, ImportError):
            raise answer
        return answer


def _work(pipe: Connection, path: Path, names: Sequence[str], make: Callable[[Bundle, str], Contender]) -> None:
    bundle = load_bundle(path)
    try:
        contenders: Mapping[str, Contender] = {name: make(bundle, name) for name in names}
    except (ImportError, EngineUnavailable) as error:
        pipe.send(ImportError(str(error)))
        return
    pipe.send({name: contender.engine for name, contender in contenders.items()})
    while (question := pipe.recv()) is not None:
        do, name, arguments = question
        pipe.send(do(contenders[name], bundle, *arguments))


def _time_ms(contender: Contender, bundle: Bundle, seed: int, count: int) -> list[float]:
    draw = np.random.default_rng(seed)
    contender.prepare()
    times_ms = []
    for _ in range(1 + count):
        observation, chunk_seed = draw_observation(bundle.spec, draw), int(draw.integers(2**63))
        started_at_s = time.perf_counter()
        contender.chunk(observation, chunk_seed)
        times_ms.append(1e3 * (time.perf_counter() - started_at_s))
    return times_ms[1:]


def _chunks(contender: Contender, bundle: Bundle, seed: int, count: int) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    contender.prepare()
    cases = [(draw_observation(bundle.spec, draw), int(draw.integers(2**63))) for _ in range(count)]
    return [contender.chunk(*case) for case in cases]
