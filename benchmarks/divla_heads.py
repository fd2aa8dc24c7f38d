"""The heads that denoise: a step, and a chunk of all steps, on every engine and in eager torch."""

import time
from contextlib import ExitStack

import numpy as np
from tqdm import tqdm

from benchmarks.contenders import AUTO, EAGER, Worker
from benchmarks.divla_bundles import describe
from benchmarks.divla_contenders import EAGER_BF16, FAST_F32, SERVED, DivlaContender, make_divla
from benchmarks.divla_part import Part, Rounds, role, row
from benchmarks.ratios import Ratio, ratio_of
from benchmarks.result import Bar, Series
from policy_models.program import Tensors
from policy_server.bundle import Bundle
from policy_server.golden import draw_observation

ROUNDS, STEPS = 6, 2
WANTED = 2.0
STEP, CHUNK = "a step", "a chunk"
# How far a step may be off eager torch in float32, as a fraction of the largest number in it.
ALLOWED = {"f32": 1e-3, "bf16": 5e-2}


def measure_head(label: str, bundle: Bundle, rounds: int) -> Part:
    """Time one head; what is written before it costs nothing here, since the head is told noise."""
    draw = np.random.default_rng(0)
    with ExitStack() as stack:
        tqdm.write(f"divla: loading {label}")
        workers = start_workers(stack, bundle, SERVED, (EAGER, EAGER_BF16))
        chosen = workers[AUTO].engines[AUTO]
        drifts = _check_equal(workers)
        times: dict[str, dict[str, Rounds]] = {name: {STEP: [], CHUNK: []} for name in workers}
        for i in tqdm(range(rounds), desc=f"divla, {label}", unit="round"):
            for name in map(str, draw.permutation(list(workers))):
                steps_ms, chunk_ms = workers[name].ask(_time_ms, name, i)
                times[name][STEP].append(steps_ms)
                times[name][CHUNK].append([chunk_ms])
    labels = {name: f"{AUTO}: {chosen}" if name == AUTO else name for name in workers}
    faster = {
        what: {name: ratio_of(times[EAGER][what], times[name][what]) for name in workers} for what in (STEP, CHUNK)
    }
    f32 = AUTO if chosen == FAST_F32 else FAST_F32
    return Part(
        rows=tuple(
            row(
                f"**{labels[name]}**" if name == AUTO else name,
                f"{what} of {label}",
                times[name][what],
                compared="" if name == EAGER else f"{faster[what][name]} times as fast as {EAGER}",
            )
            for what in (STEP, CHUNK)
            for name in workers
        ),
        series=tuple(
            Series.of(f"{CHUNK} of {label}", labels[name], role(name, AUTO, (EAGER, EAGER_BF16)), np.ravel(by[CHUNK]))
            for name, by in times.items()
        ),
        bars=(
            bar_of(f"the default engine ({labels[AUTO]})", label, faster[CHUNK][AUTO]),
            bar_of(f"float32 ({FAST_F32})", label, faster[CHUNK][f32]),
        ),
        facts={
            label: f"{describe(bundle)}; {rounds} rounds of {STEPS} steps and a chunk of "
            f"{bundle.spec.sampler.steps if bundle.spec.sampler else 0} for each contender, after a step that is not "
            f"counted",
            f"drift of a step of {label}": ", ".join(f"{name} {drift:.0e}" for name, drift in drifts.items())
            + " of its largest number",
        },
    )


def start_workers(
    stack: ExitStack, bundle: Bundle, served: tuple[str, ...], eager: tuple[str, ...]
) -> dict[str, Worker]:
    """Return the process of each contender; what `auto` chose is not started twice, and eager ones share theirs."""
    workers = {AUTO: stack.enter_context(Worker(bundle.path, (AUTO,), make_divla))}
    chosen = workers[AUTO].engines[AUTO]
    for group in (*((name,) for name in served if name != chosen), eager):
        workers.update(dict.fromkeys(group, stack.enter_context(Worker(bundle.path, group, make_divla))))
    return workers


def draw_step(bundle: Bundle, draw: np.random.Generator, rows: int = 1) -> Tensors:
    """Return random inputs of a step of a bundle's head, each row at a noise level of its own."""
    config = bundle.config

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal((rows, *shape), dtype=np.float32)

    sigma = np.exp(draw.uniform(-2, 2, rows)).astype(np.float32)
    return {
        "noisy": normal(config.horizon, config.action_width) * np.sqrt(1 + sigma**2)[:, None, None],
        "sigma": sigma,
        "context": normal(config.language.width),
        "state": normal(config.state_width),
    }


def _time_ms(contender: DivlaContender, bundle: Bundle, seed: int) -> tuple[list[float], float]:
    """Return the times of some steps, and that of a chunk."""
    draw = np.random.default_rng(seed)
    contender.prepare()
    at_s: list[float] = []
    for _ in range(1 + STEPS):
        inputs = draw_step(bundle, draw)
        began_s = time.perf_counter()
        contender.denoise(inputs)
        at_s.append(time.perf_counter() - began_s)
    observation, context = draw_observation(bundle.spec, draw), draw_step(bundle, draw)["context"]
    began_s = time.perf_counter()
    contender.sample(observation, context, seed)
    return [1e3 * took_s for took_s in at_s[1:]], 1e3 * (time.perf_counter() - began_s)


def _step(contender: DivlaContender, bundle: Bundle, seed: int) -> tuple[str, np.ndarray]:
    contender.prepare()
    return contender.precision, contender.denoise(draw_step(bundle, np.random.default_rng(seed)))


def _check_equal(workers: dict[str, Worker], draws: int = 3) -> dict[str, float]:
    """Return how far a step of each contender is off that of eager torch; raises ValueError if it is too far."""
    drifts: dict[str, float] = {}
    for name, worker in workers.items():
        for seed in range(draws):
            _, wanted = workers[EAGER].ask(_step, EAGER, seed)
            precision, got = worker.ask(_step, name, seed)
            drift = float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))
            drifts[name] = max(drift, drifts.get(name, 0.0))
            if not drift <= ALLOWED[precision]:
                raise ValueError(f"a step on {name} is {drift:.1e} off {EAGER}, {ALLOWED[precision]:.1e} is allowed")
    return drifts


def bar_of(who: str, label: str, got: Ratio) -> Bar:
    """Return what a chunk of a head had to be, and whether it was."""
    claim = f"{who} gives a chunk of {label} at least {WANTED:g} times as fast as eager torch in float32"
    return Bar(claim, f"{got} times", got.value >= WANTED)
