"""Several robots' rows in one run of a graph, against one after the other."""

import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from benchmarks.contenders import AUTO
from benchmarks.divla_contenders import THREADS
from benchmarks.divla_heads import ALLOWED, draw_step
from benchmarks.divla_part import Part, Rounds, row
from benchmarks.ratios import ratio_of
from policy_models.program import Tensors
from policy_server.bundle import Bundle
from policy_server.catalog import load_engine
from policy_server.engine.base import Engine
from policy_server.golden import GoldenCase

ROUNDS, ROWS = 20, (1, 4, 8)
FIRST_OUTPUT = {"speak": "logits", "denoise": "denoised"}
WHAT = {"speak": "a token each", "denoise": "a step each"}


def measure_batches(bundle: Bundle, rounds: int) -> Part:
    """Time `speak` and `denoise` in this process, on the default engine."""
    engine = load_engine(bundle, AUTO, THREADS).engine
    calls = GoldenCase(bundle.path / "golden.npz").calls(bundle.new_program(), engine)
    speak = next(call.inputs for call in calls if call.graph == "speak")
    draw = np.random.default_rng(0)
    together: dict[tuple[str, int], Rounds] = {(graph, rows): [] for graph in WHAT for rows in ROWS}
    alone: dict[tuple[str, int], Rounds] = {key: [] for key in together}
    for i in tqdm(range(rounds + 1), desc="divla, batches", unit="round"):
        for graph, rows in together:
            inputs = draw_word(speak, bundle, draw, rows) if graph == "speak" else draw_step(bundle, draw, rows)
            single = [{name: value[j : j + 1] for name, value in inputs.items()} for j in range(rows)]
            together_ms, got = _time_ms(engine, graph, [inputs])
            alone_ms, wanted = _time_ms(engine, graph, single)
            if not i:  # not counted, but looked at
                _check_equal(graph, got, wanted, ALLOWED[engine.precision])
                continue
            together[graph, rows].append([together_ms])
            alone[graph, rows].append([alone_ms])
    engine.close()
    return Part(
        rows=tuple(
            row(
                f"{rows} robots in one run" if rows > 1 else "1 robot",
                WHAT[graph],
                mine,
                count=rows,
                compared=f"{ratio_of(alone[graph, rows], mine)} times as fast as one at a time" if rows > 1 else "",
            )
            for (graph, rows), mine in together.items()
        ),
        facts={"batches": f"the language model's policy on {AUTO}: {engine.name}; {rounds} rounds, in turns"},
    )


def draw_word(like: Tensors, bundle: Bundle, draw: np.random.Generator, rows: int) -> Tensors:
    """Return random inputs of `speak`, shaped like `like`: every robot at a word and with a memory of its own."""
    cache, vocabulary = like["cache"], bundle.config.language.vocabulary
    return {
        "token": draw.integers(0, vocabulary, (rows, 1)),
        "position": np.repeat(like["position"], rows, axis=0),
        "cache": draw.standard_normal((rows, *cache.shape[1:]), dtype=np.float32),
        "mask": np.repeat(like["mask"], rows, axis=0),
    }


def _time_ms(engine: Engine, graph: str, calls: Sequence[Tensors]) -> tuple[float, np.ndarray]:
    began_s = time.perf_counter()
    answers = [engine.run(graph, call)[FIRST_OUTPUT[graph]] for call in calls]
    return 1e3 * (time.perf_counter() - began_s), np.concatenate(answers)


def _check_equal(graph: str, got: np.ndarray, wanted: np.ndarray, allowed: float) -> None:
    drift = float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))
    if not drift <= allowed:
        raise ValueError(f"rows of {graph} in one run are {drift:.1e} off those alone, {allowed:.1e} is allowed")
