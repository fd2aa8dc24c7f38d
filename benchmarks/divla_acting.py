"""Robots that act at a rate while their policy reasons without a pause, for longer and longer."""

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.divla_bundles import describe, shortened
from benchmarks.divla_part import Part, Rounds, row
from benchmarks.processes import ours, serving
from benchmarks.questions import Question, inputs_of
from benchmarks.ratios import ratio_of
from benchmarks.result import Bar, Series
from benchmarks.robot_load import ROBOT_KEY, Load, Round, run_round
from benchmarks.robot_socket import frame_of
from policy_client.codec import pack, unpack
from policy_models.spec import PolicySpec
from policy_server.bundle import Bundle
from policy_server.engine.base import ENGINES
from policy_server.golden import GoldenCase, draw_observation

ENGINE = "onnx"
TOKENS = (8, 32, 128)
ROUNDS, ROBOTS, RATE_HZ = 6, 4, 10.0
ROUND_S, QUICK_S = 4.0, 1.0
QUESTIONS = 16
WANTED = 1.25
NONE = 0  # tokens of robots that do not reason
LATEST: dict[str, Any] = {"mode": "latest", "every_s": 0}


def measure_acting(bundle: Bundle, rounds: int, seconds: float) -> Part:
    """Time chunks of a server whose robots reason in `TOKENS` tokens, and of one whose robots do not reason."""
    draw = np.random.default_rng(0)
    latencies: dict[int, Rounds] = {tokens: [] for tokens in (NONE, *TOKENS)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls: dict[int, str] = {}
        for tokens in TOKENS:
            path = shortened(bundle, tokens, folder / f"{tokens}")
            words = ["--engine", ENGINE, "--threads", "1", "--api-keys", ROBOT_KEY]
            urls[tokens] = stack.enter_context(serving([*ours(path), *words])).url
        urls[NONE] = urls[TOKENS[-1]]
        _check_lengths(bundle)
        asked = {
            tokens: draw_questions(bundle.spec, "none" if tokens == NONE else LATEST) for tokens in (NONE, *TOKENS)
        }
        for _ in tqdm(range(rounds), desc="divla, acting", unit="round"):
            seed = int(draw.integers(2**32))  # the same schedule for all
            for tokens in map(int, draw.permutation(list(latencies))):
                result = run_round(urls[tokens], asked[tokens], Load(ROBOTS, seconds, RATE_HZ), seed)
                _check(result, reasons=tokens != NONE)
                latencies[tokens].append(result.latencies_ms)

    def compared(tokens: int) -> str:
        if tokens == NONE:
            return ""
        return f"p99 {ratio_of(latencies[tokens], latencies[NONE], 99)} times that of not reasoning"

    what = f"a chunk, {ROBOTS} robots at {RATE_HZ:g} Hz"
    got = ratio_of(latencies[TOKENS[-1]], latencies[TOKENS[0]], 99)
    return Part(
        rows=tuple(
            (*row(_label(tokens), what, mine)[:4], f"{ROBOTS * RATE_HZ:g} asked", compared(tokens))
            for tokens, mine in latencies.items()
        ),
        series=tuple(
            Series.of(what, _label(tokens), "reference" if tokens == NONE else "ours", np.concatenate(mine))
            for tokens, mine in latencies.items()
        ),
        bars=(
            Bar(
                f"p99 of chunks while {TOKENS[-1]} tokens are reasoned at most {WANTED:g} times that while "
                f"{TOKENS[0]} are",
                f"{got} times",
                got.value <= WANTED,
            ),
        ),
        facts={
            "acting": f"{describe(bundle)}; {rounds} rounds of {seconds:g} s, {ENGINE} with one thread; a latency "
            "counts from when a robot should have asked",
        },
    )


def _label(tokens: int) -> str:
    return "no reasoning" if tokens == NONE else f"reasonings of {tokens} tokens"


def draw_questions(spec: PolicySpec, reasoning: Any) -> list[Question]:
    """Return random observations as robots send them, with what they ask of reasoning; their answers are not known."""
    draw = np.random.default_rng(1)
    questions = []
    for _ in range(QUESTIONS):
        # One instruction for all: the first chunk after a new one waits for a reasoning, as it should.
        observation = replace(draw_observation(spec, draw), goal=spec.goal.examples[0])
        seed = int(draw.integers(2**63))
        message = {**inputs_of(observation), "options": {"seed": seed, "reasoning": reasoning}}
        questions.append(Question(frame_of(pack(message)), seed, np.empty(0)))
    return questions


def _check_lengths(bundle: Bundle) -> None:
    """Raise ValueError unless the longest reasoning is as long as it may be, on the engine that is served."""
    calls = GoldenCase(bundle.path / "golden.npz").calls(bundle.new_program(), ENGINES[ENGINE].make(bundle, 1))
    got = 1 + sum(call.graph == "speak" for call in calls)
    if got != bundle.config.reasoning_tokens:
        raise ValueError(f"{bundle.name} reasons in {got} tokens, expected {bundle.config.reasoning_tokens}")


def _check(result: Round, *, reasons: bool) -> None:
    """Raise ValueError if a reply is no chunk, acts on words although it should not, or on none although it should."""
    for question, payload in result.sample:
        reply = unpack(payload)
        if not np.isfinite(reply["actions"]).all() or reply["seed"] != question.seed:
            raise ValueError(f"a server answered with {reply}")
        if bool(reply["reasoning"]) != reasons:
            raise ValueError(f"a server's chunk acts on {reply['reasoning']!r}")
