"""One action chunk of the bundled policy, by engine.

From a checked observation to actions in the robot's units: normalisation, the whole sampler loop and the network; no
network protocol. Every observation and every seed is drawn anew. The yardstick is the same network in eager torch under
`torch.inference_mode`, sampler loop included, with torch's default number of threads and with one. Before the clock
starts, all contenders must give the same actions for the same observation and seed, up to the rounding of their
precision. `auto` is what the server runs unless told otherwise.

All contenders take turns, round by round and in random order, each for a short block whose first chunk is not counted.
First each has a process of its own, where it meets only itself; that is how the server runs, and what the bar is held
to and the picture shows. Then all share one process, where they may get into the way of each other's thread pools.
The ratio of two contenders is far steadier than the time of either; its interval is a bootstrap over the rounds.
`openvino-bf16` computes in bfloat16 and rounds accordingly; the other engines compute in float32. `torch` is the oracle
that the other engines are checked against, run through the same interface as they are. Threads are the library's
default unless it says otherwise.
"""

from contextlib import ExitStack

import numpy as np
from tqdm import tqdm

from benchmarks.contenders import AUTO, EAGER, EAGER_ONE, Worker, contender_names, make_contender
from benchmarks.machine import describe_machine
from benchmarks.ratios import Ratio, ratio_of
from benchmarks.result import Bar, Result, Series, ms
from benchmarks.settings import Settings
from policy_server.bundle import Bundle, load_bundle
from policy_server.errors import EngineUnavailable
from policy_server.golden import draw_observation

ROUNDS, BLOCK = 300, 3
WANTED = 2.5
# A bundle's tolerance is meant for its one golden case; the worst of many observations may lie further off.
SAME = 5.0
OWN, SHARED = "each in a process of its own", "all in one process"

Times = dict[str, list[list[float]]]  # ms, by contender and round


def run(settings: Settings, command: str) -> Result:
    """Time every engine that is installed."""
    machine = describe_machine()
    bundle = load_bundle(settings.bundle)
    drifts = _check_equal(bundle)
    rounds = settings.rounds(ROUNDS)
    own, chosen = _time(bundle, list(drifts), rounds, OWN)
    shared, chosen_shared = _time(bundle, list(drifts), rounds, SHARED)
    labels = {name: f"{AUTO}: {chosen}" if name == AUTO else name for name in drifts}
    return Result(
        name="chunk",
        machine=machine,
        command=command,
        columns=(
            "",
            "p50 ms",
            "p99 ms",
            "times as fast as eager torch",
            "times as fast as eager torch, 1 thread",
            "as eager torch, all in one process",
            "drift",
        ),
        rows=tuple(
            (
                f"**{labels[name]}**" if name == AUTO else name,
                *(ms(float(np.percentile(own[name], percent))) for percent in (50, 99)),
                str(ratio_of(own[EAGER], own[name])),
                str(ratio_of(own[EAGER_ONE], own[name])),
                str(ratio_of(shared[EAGER], shared[name])),
                f"{drifts[name]:.0e}",
            )
            for name in drifts
        ),
        series=tuple(Series.of(OWN, labels[name], _role(name), np.ravel(own[name])) for name in drifts),
        bars=tuple(
            _bar(yardstick, ratio_of(own[yardstick], own[AUTO]), labels[AUTO]) for yardstick in (EAGER, EAGER_ONE)
        ),
        facts={
            "policy": _describe(bundle),
            "rounds": f"{rounds} of {BLOCK} chunks for each contender, in each of the two arrangements",
            "auto": f"chose {chosen} in its own process, {chosen_shared} in the shared one",
            "drift": "largest deviation from eager torch over 20 random observations, as a fraction of the action's "
            "range",
        },
    )


def _check_equal(bundle: Bundle, observations: int = 20) -> dict[str, float]:
    """Return the drift from eager torch of each contender that is installed.

    Raises:
        ValueError: One of them computes something else.
    """
    draw = np.random.default_rng(0)
    cases = [(draw_observation(bundle.spec, draw), int(draw.integers(2**63))) for _ in range(observations)]
    yardstick = make_contender(bundle, EAGER)
    wanted = [yardstick.chunk(*case) for case in cases]
    action = bundle.spec.action
    span = np.subtract(action.high, action.low) if action.high and action.low else np.ptp(wanted, axis=(0, 1))
    drifts = {}
    for name in contender_names(bundle):
        try:
            contender = make_contender(bundle, name)
        except (ImportError, EngineUnavailable) as error:
            tqdm.write(f"chunk: left out {name}: {error}")
            continue
        deviations = [contender.chunk(*case) - right for case, right in zip(cases, wanted, strict=True)]
        drifts[name] = float(np.max(np.abs(deviations) / span))
        allowed = SAME * bundle.manifest.tolerance[contender.precision]
        if not drifts[name] <= allowed:
            raise ValueError(f"{name} drifts {drifts[name]:.1e} from {EAGER}, {allowed:.1e} is allowed")
    return drifts


def _time(bundle: Bundle, names: list[str], rounds: int, panel: str) -> tuple[Times, str]:
    """Return the times, and which engine `auto` chose."""
    times: Times = {name: [] for name in names}
    draw = np.random.default_rng(1)
    groups = [[name] for name in names] if panel == OWN else [names]
    with ExitStack() as stack:
        workers = {}
        for group in groups:
            worker = stack.enter_context(Worker(bundle.path, group))
            workers.update(dict.fromkeys(group, worker))
        for i in tqdm(range(rounds), desc=f"chunk, {panel}", unit="round"):
            for name in map(str, draw.permutation(names)):
                times[name].append(workers[name].time_block_ms(name, i, BLOCK))
        return times, workers[AUTO].engines[AUTO]


def _bar(yardstick: str, got: Ratio, label: str) -> Bar:
    claim = f"the default engine ({label}) is at least {WANTED} times as fast as {yardstick}"
    return Bar(claim, f"{got} times", got.value >= WANTED)


def _role(name: str) -> str:
    return "ours" if name == AUTO else "reference" if name in (EAGER, EAGER_ONE) else "peer"


def _describe(bundle: Bundle) -> str:
    count = sum(array.size for array in bundle.assets.weights.values())
    spec, manifest = bundle.spec, bundle.manifest
    sampling = f", {spec.sampler.steps} steps of {spec.sampler.sampler}" if spec.sampler else ""
    return (
        f"{manifest.name} {manifest.version} ({manifest.family}), {count / 1e6:.2g} million parameters, "
        f"chunk of {spec.horizon} actions{sampling}"
    )
