"""Eight robots in one denoising step of a MoDE policy of released size, against one after the other.

One call of the denoiser with eight rows, against eight calls with one row each, in turns, on the default engine. Where
robots step together all rows share a noise level, and so their experts. At eight different levels the graph computes
every expert that any row chose for all rows, and the rows it does not concern get a weight of zero.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from benchmarks.contenders import AUTO
from benchmarks.large_bundle import describe, large_bundle
from benchmarks.machine import describe_machine
from benchmarks.ratios import ratio_of
from benchmarks.result import Result, Series, ms
from benchmarks.settings import Settings
from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels
from policy_models.mode.routing import Routes
from policy_server.bundle import Bundle
from policy_server.catalog import load_engine
from policy_server.engine.base import Engine, Tensors

ROUNDS, ROBOTS = 30, 8
SAME, MIXED = "all at one noise level", "at eight noise levels"
TOGETHER, ONE_BY_ONE = "eight rows in one call", "eight calls"
# Matrices of another height are rounded otherwise, in bfloat16 most of all.
_TOLERANCE: Mapping[str, float] = {"f32": 1e-3, "bf16": 1e-1}


def run(settings: Settings, command: str) -> Result:
    """Time both ways in this process: they share one engine."""
    machine = describe_machine()
    bundle = large_bundle(settings)
    engine = load_engine(bundle, AUTO, 0).engine
    rounds = settings.rounds(ROUNDS)
    draw = np.random.default_rng(0)
    times: dict[tuple[str, str], list[list[float]]] = {
        (panel, way): [] for panel in (SAME, MIXED) for way in (TOGETHER, ONE_BY_ONE)
    }
    for i in tqdm(range(rounds + 1), desc="large_batch", unit="round"):
        for panel in (SAME, MIXED):
            rows = _draw_rows(bundle, draw, mixed=panel == MIXED)
            single = [{name: value[j : j + 1] for name, value in rows.items()} for j in range(ROBOTS)]
            together_ms, together = _time_ms(engine, [rows])
            alone_ms, alone = _time_ms(engine, single)
            if not i:  # not counted, but looked at
                _check_equal(together, alone, _TOLERANCE[engine.precision])
                continue
            times[panel, TOGETHER].append([together_ms])
            times[panel, ONE_BY_ONE].append([alone_ms])
    engine.close()
    return Result(
        name="large_batch",
        machine=machine,
        command=command,
        columns=("", TOGETHER + ", ms", ONE_BY_ONE + ", ms", "times as fast"),
        rows=tuple(
            (
                panel,
                ms(float(np.median(times[panel, TOGETHER]))),
                ms(float(np.median(times[panel, ONE_BY_ONE]))),
                str(ratio_of(times[panel, ONE_BY_ONE], times[panel, TOGETHER])),
            )
            for panel in (SAME, MIXED)
        ),
        series=tuple(
            Series.of(panel, way, "ours" if way == TOGETHER else "reference", np.ravel(measured))
            for (panel, way), measured in times.items()
        ),
        bars=(),
        facts={
            "policy": describe(bundle),
            "rounds": f"{rounds} of each, in turns",
            "engine": f"{AUTO}: {engine.name}",
        },
    )


def _draw_rows(bundle: Bundle, draw: np.random.Generator, *, mixed: bool) -> Tensors:
    """Return the inputs of one denoising step of `ROBOTS` robots."""
    config, sampler = bundle.config.transformer, bundle.spec.sampler
    assert sampler is not None
    levels = NoiseLevels(sampler.sigma_min, sampler.sigma_max, sampler.rho)
    sigmas = np.array(SCHEDULES[sampler.schedule](sampler.steps, levels)[:ROBOTS])
    sigma = sigmas if mixed else np.full(ROBOTS, draw.choice(sigmas))

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal((ROBOTS, *shape), dtype=np.float32)

    return {
        "noisy": normal(config.horizon, config.action_width) * sigma[:, None, None].astype(np.float32),
        "sigma": sigma.astype(np.float32),
        "tokens": normal(len(bundle.spec.cameras), config.token_width),
        "goal": normal(config.goal_width),
        "route": Routes(config, bundle.assets.weights).of(list(sigma)),
    }


def _time_ms(engine: Engine, calls: Sequence[Tensors]) -> tuple[float, np.ndarray]:
    started_at_s = time.perf_counter()
    answers = [engine.run("denoise", call)["denoised"] for call in calls]
    return 1e3 * (time.perf_counter() - started_at_s), np.concatenate(answers)


def _check_equal(together: np.ndarray, alone: np.ndarray, allowed: float) -> None:
    drift = float(np.max(np.abs(together - alone)) / np.max(np.abs(alone)))
    if not drift <= allowed:
        raise ValueError(f"rows of a batch are {drift:.1e} off those computed alone, {allowed:.1e} is allowed")
