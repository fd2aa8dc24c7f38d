"""A policy that reasons in words, through every door of a server that runs for real."""

import threading
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from policy_client import PolicyClient, ServerError
from policy_client.codec import pack
from policy_client.stream import PolicyStream
from policy_client.stream_protocol import Reasoning
from policy_server.bundle import Bundle
from tests.conftest import RunningServer, launched
from tests.service.robot import refusal_of

SEEN = {
    "top": np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8),
    "state": np.array([0.1, -0.2], np.float32),
    "prompt": "put it there",
}
WORDS = "Take it."


@pytest.fixture(scope="module")
def thinker(tiny_divla_bundle: Bundle, tiny_bundle: Bundle) -> Iterator[RunningServer]:
    """A server of a policy that reasons, and of one that does not."""
    with launched(tiny_divla_bundle.path, tiny_bundle.path, "--engine", "onnx") as server:
        yield server


@pytest.fixture
def robot(thinker: RunningServer) -> Iterator[PolicyClient]:
    with PolicyClient(f"ws://127.0.0.1:{thinker.port}/v1/policies/tiny-divla/openpi") as client:
        yield client


def given(text: str) -> dict[str, str]:
    return {"mode": "given", "text": text}


def test_an_openpi_reply_says_what_it_acts_on(robot: PolicyClient) -> None:
    chunk = robot.infer(SEEN, seed=7, reasoning=given(WORDS))
    assert chunk.metadata["reasoning"] == chunk.reasoning == WORDS
    assert isinstance(robot.infer(SEEN, seed=7, reasoning="fresh").reasoning, str)


def test_what_is_said_moves_the_actions_and_the_same_words_give_the_same_chunk(robot: PolicyClient) -> None:
    one, same, other, none = (
        robot.infer(SEEN, seed=7, reasoning=reasoning).actions
        for reasoning in (given(WORDS), given(WORDS), given("there"), "none")
    )
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other, atol=1e-3)
    assert not np.allclose(one, none, atol=1e-3)


def test_http_says_it_too_and_answers_questions(thinker: RunningServer) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{thinker.port}/v1/policies/tiny-divla", timeout=30.0) as http:
        body = pack({"observation": SEEN, "options": {"seed": 7, "reasoning": given(WORDS)}})
        headers = {"content-type": "application/msgpack", "accept": "application/json"}
        assert b"Take it." in http.post("/act", content=body, headers=headers).content
        asked = pack({"observation": {"top": SEEN["top"], "state": SEEN["state"]}, "question": "what is there"})
        answered = http.post("/ask", content=asked, headers=headers)
        assert answered.status_code == 200 and b"answer" in answered.content


def test_a_stream_tells_the_words_as_they_come_and_which_of_them_a_chunk_acts_on(thinker: RunningServer) -> None:
    told: list[Reasoning] = []
    ended = threading.Event()

    def hear(reasoning: Reasoning) -> None:
        told.append(reasoning)
        if reasoning.ended:
            ended.set()

    url = f"ws://127.0.0.1:{thinker.port}/v1/policies/tiny-divla/stream"
    with PolicyStream(url, on_reasoning=hear) as stream:
        chunk = stream.wait_for(stream.send(SEEN), 10.0)
        assert ended.wait(10.0)
        acted_on = chunk.metadata["reasoning"]
        done = next(reasoning for reasoning in told if reasoning.ended)
        assert (done.number, done.text, done.ended) == (acted_on["number"], acted_on["text"], acted_on["ended"])
        assert all(
            done.text.startswith(reasoning.text.strip()) for reasoning in told if reasoning.number == done.number
        )

        stream.set(reasoning=given(WORDS))  # one message pins a thought
        assert stream.wait_for(stream.send(SEEN), 10.0).reasoning == WORDS
        stream.set()
        until_s = time.monotonic() + 10.0
        while stream.wait_for(stream.send(SEEN), 10.0).metadata["reasoning"]["ended"] == "given":
            assert time.monotonic() < until_s, "the policy never thinks for itself again"


@pytest.mark.parametrize(
    ("change", "options", "code"),
    [
        ({"prompt": " "}, {}, "wrong_type"),
        ({"prompt": "put it there " * 20}, {}, "unusable_goal"),
        ({}, {"reasoning": given("Take it. " * 9)}, "unusable_goal"),
        ({}, {"reasoning": "aloud"}, "invalid_option"),
        ({"wrist": SEEN["top"]}, {}, "unexpected_input"),
    ],
    ids=["empty instruction", "context overflows", "longer than a reasoning", "no such way", "an image too many"],
)
def test_what_cannot_be_is_refused(robot: PolicyClient, change, options, code: str) -> None:
    with pytest.raises(ServerError) as refused:
        robot.infer({**SEEN, **change}, **options)
    assert refused.value.code == code


def test_an_image_too_few_is_refused(robot: PolicyClient) -> None:
    with pytest.raises(ServerError, match="'top' is missing"):
        robot.infer({name: value for name, value in SEEN.items() if name != "top"})


def test_a_policy_without_words_refuses_them(thinker: RunningServer) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{thinker.port}/v1/policies/tiny", timeout=30.0) as http:
        observation = {"state": [0.0] * 4, "goal": [0.0] * 4}
        asked = http.post("/ask", json={"observation": observation, "question": "why"})
        acted = http.post("/act", json={"observation": observation, "options": {"reasoning": "latest"}})
    assert refusal_of(asked).code == refusal_of(acted).code == "invalid_option"
