"""Every engine on every graph of a policy that reasons."""

from collections.abc import Iterator

import numpy as np
import pytest

from policy_models.program import GraphCall
from policy_server.bundle import Bundle
from policy_server.engine.base import ENGINES, Engine
from policy_server.golden import GoldenCase
from policy_server.runtime.sampling import run_together
from tests.contract.engines import make_engine

CPU = [name for name, choice in ENGINES.items() if choice.device == "cpu" and choice.precision == "f32"]


@pytest.fixture(params=CPU, scope="module")
def engine(request: pytest.FixtureRequest, tiny_divla_bundle: Bundle) -> Iterator[Engine]:
    engine = make_engine(request.param, tiny_divla_bundle)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def oracle(tiny_divla_bundle: Bundle) -> Engine:
    return ENGINES["torch"].make(tiny_divla_bundle, 1)


@pytest.fixture(scope="module")
def calls(tiny_divla_bundle: Bundle, oracle: Engine) -> list[GraphCall]:
    """What the golden case asks, and an answer that somebody else gives."""
    bundle = tiny_divla_bundle
    case = GoldenCase(bundle.path / "golden.npz")
    asked = case.calls(bundle.new_program(), oracle)
    hearing = bundle.new_program().hear(case.observation(), "Take it.")
    call = next(hearing)
    while call.graph != "hear":
        call = hearing.send(oracle.run(call.graph, call.inputs))
    return [*asked, call]


def test_the_conversation_asks_every_graph(calls, tiny_divla_bundle: Bundle) -> None:
    assert {call.graph for call in calls} == set(tiny_divla_bundle.graphs())


def test_each_answers_as_torch_does(engine: Engine, oracle: Engine, calls) -> None:
    for call in calls:
        got, wanted = engine.run(call.graph, call.inputs), oracle.run(call.graph, call.inputs)
        assert got.keys() == wanted.keys()
        for name, array in wanted.items():
            assert got[name].shape == array.shape, (call.graph, name)
            np.testing.assert_allclose(got[name], array, atol=1e-4 * max(1.0, np.abs(array).max()), err_msg=call.graph)


def test_words_of_several_robots_share_a_run_wherever_each_of_them_is(engine: Engine, calls) -> None:
    spoken = [call for call in calls if call.graph == "speak"]
    assert len(spoken) > 2, "the policy says something"
    for call, together in zip(spoken, run_together(spoken, engine), strict=True):
        for name, alone in engine.run("speak", call.inputs).items():
            np.testing.assert_allclose(together[name], alone, atol=1e-4 * max(1.0, np.abs(alone).max()))
