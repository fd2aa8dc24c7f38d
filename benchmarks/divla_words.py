"""The language model: tokens a second, and the first action after it has looked, read and reasoned."""

import time
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from benchmarks.contenders import AUTO, EAGER
from benchmarks.divla_bundles import describe
from benchmarks.divla_contenders import SERVED, DivlaContender
from benchmarks.divla_heads import start_workers
from benchmarks.divla_part import Part, Rounds, role, row
from benchmarks.ratios import ratio_of
from benchmarks.result import Series
from policy_models.divla.config import DivlaConfig
from policy_models.spec import Observation
from policy_server.bundle import Bundle
from policy_server.golden import draw_observation

ROUNDS = 5
TOKEN, FIRST, AGAIN = "a token of a reasoning", "images to the first action", "the same, images and prompt read twice"
_F32 = ("openvino", "onnx", EAGER)


@dataclass(frozen=True)
class _Times:
    """What one observation took, in ms; `again_ms` is 0 where nothing is read twice."""

    token_ms: float
    first_ms: float
    again_ms: float


def measure_words(bundle: Bundle, rounds: int) -> Part:
    """Time reasoning, and the chunk that follows it."""
    draw = np.random.default_rng(0)
    with ExitStack() as stack:
        tqdm.write("divla: loading the language model")
        workers = start_workers(stack, bundle, SERVED, (EAGER,))
        chosen = workers[AUTO].engines[AUTO]
        _check_words({name: worker.ask(_words, name) for name, worker in workers.items()}, chosen)
        measured: dict[str, list[_Times]] = {name: [] for name in workers}
        for i in tqdm(range(rounds), desc="divla, words", unit="round"):
            for name in map(str, draw.permutation(list(workers))):
                measured[name].append(workers[name].ask(_time, name, i))
    labels = {name: f"{AUTO}: {chosen}" if name == AUTO else name for name in workers}
    times: dict[str, dict[str, Rounds]] = {
        name: {
            TOKEN: [[one.token_ms] for one in mine],
            FIRST: [[one.first_ms] for one in mine],
            AGAIN: [[one.again_ms] for one in mine],
        }
        for name, mine in measured.items()
    }

    def compared(name: str, what: str) -> str:
        if what == AGAIN:
            return f"{ratio_of(times[name][AGAIN], times[name][FIRST])} times as long as read once"
        ratio = ratio_of(times[EAGER][what], times[name][what])
        return "" if name == EAGER else f"{ratio} times as fast as {EAGER}"

    return Part(
        rows=tuple(
            row(
                f"**{labels[name]}**" if name == AUTO else name,
                what,
                times[name][what],
                compared=compared(name, what),
            )
            for what in (TOKEN, FIRST, AGAIN)
            for name in workers
            if what != AGAIN or name != EAGER  # whoever generates reads once
        ),
        series=tuple(
            Series.of(FIRST, labels[name], role(name, AUTO, (EAGER,)), np.ravel(by[FIRST]))
            for name, by in times.items()
        ),
        facts={
            "language model": f"{describe(bundle)}; {rounds} rounds of a reasoning of {_most(bundle)} tokens and its "
            "chunk for each contender, after one that is not counted",
        },
    )


def _time(contender: DivlaContender, bundle: Bundle, seed: int) -> _Times:
    observation = draw_observation(bundle.spec, np.random.default_rng(seed))
    contender.prepare()
    said = contender.reason(observation)

    def act_ms(*, again: bool) -> float:
        began_s = time.perf_counter()
        contender.act(observation, said.reasoning, seed, again=again)
        return 1e3 * (time.perf_counter() - began_s)

    reads_twice = contender.engine != EAGER
    return _Times(
        said.tokens_ms / said.tokens,
        said.whole_ms + act_ms(again=False),
        said.whole_ms + act_ms(again=True) if reads_twice else 0.0,
    )


def _words(contender: DivlaContender, bundle: Bundle) -> tuple[str, int]:
    """Return what is said of one observation, and how many tokens that takes; nothing here is timed."""
    observation: Observation = draw_observation(bundle.spec, np.random.default_rng(0))
    contender.prepare()
    said = contender.reason(observation)
    contender.act(observation, said.reasoning, 0, again=False)
    wanted = _most(bundle) - 1
    if said.tokens != wanted:
        raise ValueError(f"{contender.engine} said {said.tokens} tokens after the first, expected {wanted}")
    return said.reasoning.text, said.tokens


def _check_words(said: dict[str, tuple[str, int]], chosen: str) -> None:
    """Raise ValueError if two contenders in float32 say something else; in bfloat16 other words may be likeliest."""
    for name, words in said.items():
        if (chosen if name == AUTO else name) in _F32 and words != said[EAGER]:
            raise ValueError(f"{name} says {words[0]!r}, {EAGER} {said[EAGER][0]!r}")


def _most(bundle: Bundle) -> int:
    assert bundle.spec.reasoning is not None, "DiVLA reasons"
    config: DivlaConfig = bundle.config
    return min(config.reasoning_tokens, bundle.spec.reasoning.tokens)
