"""Several dialogues that share an engine's batches: each ends as it would alone."""

import numpy as np
import pytest

from policy_models.program import GraphCall, Outcome, UnsuitableOptions
from policy_models.spec import SamplingOptions
from policy_server.engine.base import ENGINES
from policy_server.errors import Abandoned, InvalidOption
from policy_server.golden import draw_observation
from policy_server.runtime.sampling import drive, drive_together


class Doubling:
    """Doubles every row, and notes how many rows each run had."""

    name, precision = "doubling", "f32"
    differentiable = False
    most_runs = 1

    def __init__(self) -> None:
        self.rows = []

    def run(self, graph, inputs):
        self.rows.append(len(inputs["x"]))
        return {"x": 2 * inputs["x"]}

    def close(self) -> None:
        """Nothing to give back."""


def _always(place: int) -> bool:
    return True


def _walk(start: float, steps: int, rows: int = 1, graph: str = "denoise"):
    x = np.full((rows, 2), start, dtype=np.float32)
    for _ in range(steps):
        x = (yield GraphCall(graph, {"x": x}))["x"]
    return Outcome(x, {})


def test_dialogues_of_different_lengths_and_rows_each_get_their_own_answers() -> None:
    engine = Doubling()
    outcomes = drive_together([_walk(1, 3), _walk(10, 1, rows=2), _walk(5, 0)], engine, _always)
    assert [outcome.actions[0, 0] for outcome in outcomes] == [8, 20, 5]
    assert engine.rows == [3, 1, 1]


def test_other_graphs_and_other_shapes_are_other_runs() -> None:
    engine = Doubling()
    drive_together([_walk(1, 1), _walk(1, 1, graph="perceive")], engine, _always)
    assert engine.rows == [1, 1]


def test_one_dialogues_error_is_no_others() -> None:
    def unsuitable():
        raise UnsuitableOptions("fewer steps")
        yield

    def broken():
        yield GraphCall("denoise", {"x": np.ones((1, 2), np.float32)})
        raise RuntimeError("its own mistake")

    refused, failed, answered = drive_together([unsuitable(), broken(), _walk(1, 2)], Doubling(), _always)
    assert isinstance(refused, InvalidOption)
    assert str(failed) == "its own mistake"
    assert answered.actions[0, 0] == 4


def test_what_nobody_waits_for_is_dropped_between_two_steps_and_the_others_go_on() -> None:
    engine = Doubling()
    dropped, kept = drive_together([_walk(1, 50), _walk(1, 4)], engine, lambda place: place or len(engine.rows) < 2)
    assert isinstance(dropped, Abandoned)
    assert kept.actions[0, 0] == 16
    assert engine.rows == [2, 2, 1, 1]


def test_an_engine_that_fails_fails_those_it_was_asked_for() -> None:
    class Failing(Doubling):
        def run(self, graph, inputs):
            if graph == "perceive":
                raise RuntimeError("out of memory")
            return super().run(graph, inputs)

    failed, answered = drive_together([_walk(1, 1, graph="perceive"), _walk(1, 1)], Failing(), _always)
    assert str(failed) == "out of memory"
    assert answered.actions[0, 0] == 2


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_mode_bundle"])
def test_robots_with_their_own_options_get_what_they_would_get_alone(bundle: str, request) -> None:
    bundle = request.getfixturevalue(bundle)
    program, draw = bundle.new_program(), np.random.default_rng(0)
    engine = ENGINES["onnx"].make(bundle, 1)
    asked = [
        (draw_observation(bundle.spec, draw), SamplingOptions(seed, steps, sampler, guidance))
        for seed, (steps, sampler, guidance) in enumerate(
            [(3, "ddim", 1.0), (5, "ddim", 1.0), (3, "heun", 1.5), (4, "euler_ancestral", 0.0), (3, "ddim", 1.0)]
        )
    ]
    alone = [drive(program.infer(o, program.begin(), s), engine).actions for o, s in asked]
    together = drive_together([program.infer(o, program.begin(), s) for o, s in asked], engine, _always)
    for got, wanted in zip(together, alone, strict=True):
        np.testing.assert_allclose(got.actions, wanted, atol=1e-5)
