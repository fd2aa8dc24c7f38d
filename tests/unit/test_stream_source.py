"""A stream as a player's source of chunks: when an answer is expected, and what is told."""

from __future__ import annotations

import numpy as np
import pytest

from policy_client import ActionChunk, Request, RequestTimeout, StreamRefusal, StreamStats
from policy_client.sources import StreamSource


class FakeStream:
    """Sends nowhere; the test says what has come. The first observations meet what `fates` say, in order."""

    def __init__(self, fates=()):
        self.fates = list(fates)
        self.sent = []
        self.waited_for = []
        self.newest = None
        self.refusals = {}
        self.stats = StreamStats()

    def send(self, observation, **told):
        self.sent.append((observation, told))
        return len(self.sent)

    def latest(self):
        return self.newest

    def refusal_of(self, seq):
        return self.refusals.get(seq)

    def wait_for(self, seq, timeout_s):
        self.waited_for.append(seq)
        fate = self.fates.pop(0) if self.fates else None
        if isinstance(fate, Exception):
            raise fate
        return self.answer(seq)

    def answer(self, seq, made_at_s=1.0, received_s=1.25):
        metadata = {"seq": seq, "received_s": received_s}
        self.newest = ActionChunk(np.zeros((2, 1), np.float32), 0.1, made_at_s, metadata)
        return self.newest


def request(captured_s=10.0):
    return Request({"state": 0.0}, captured_s, 3, 0.25, {"steps": 4})


def refused(code):
    return StreamRefusal(code, "no", 1)


def test_a_request_says_all_that_the_protocol_can():
    stream = FakeStream()
    StreamSource(stream).ask(request())
    assert stream.sent == [({"state": 0.0}, {"captured_s": 10.0, "playing": 3, "delay_s": 0.25, "steps": 4})]


def test_an_answer_is_taken_once():
    stream = FakeStream()
    source = StreamSource(stream)
    source.ask(request())
    assert source.take() is None
    assert source.busy(10.5)
    chunk = stream.answer(1)
    arrival = source.take()
    assert (arrival.chunk, arrival.seq, arrival.latency_s) == (chunk, 1, 0.25)
    assert source.take() is None
    assert not source.busy(10.5)


def test_the_answer_to_an_earlier_observation_is_played_but_not_mistaken_for_that_to_the_last():
    stream = FakeStream()
    source = StreamSource(stream)
    source.ask(request())
    source.ask(request())
    stream.answer(1)
    assert source.take().seq == 1
    assert source.busy(10.5)


def test_an_answer_that_does_not_come_is_waited_for_only_so_long():
    source = StreamSource(FakeStream(), patience_s=1.0)
    assert not source.busy(10.0)
    source.ask(request(10.0))
    assert source.busy(10.9)
    assert not source.busy(11.0)


def test_no_answer_is_expected_from_a_connection_that_was_lost():
    stream = FakeStream()
    source = StreamSource(stream)
    source.ask(request())
    stream.stats = StreamStats(reconnects=1)
    assert not source.busy(10.1)
    source.ask(request(10.1))
    assert source.busy(10.2)


def test_a_refusal_is_raised_once():
    stream = FakeStream()
    source = StreamSource(stream)
    source.ask(request())
    stream.refusals[1] = refused("shape_mismatch")
    with pytest.raises(StreamRefusal):
        source.take()
    assert source.take() is None
    assert not source.busy(10.1)


def test_the_first_chunk_is_asked_for_again_while_the_policy_warms_up():
    stream = FakeStream([RequestTimeout("slow"), refused("deadline_exceeded")])
    arrival = StreamSource(stream).first(lambda: {}, {"steps": 4})
    assert stream.sent == [({}, {"playing": 0, "steps": 4})] * 3
    assert stream.waited_for == [1, 1, 3]  # a late answer to the first does as well
    assert arrival.seq == 3


def test_a_first_observation_that_can_never_be_answered_is_reported():
    with pytest.raises(StreamRefusal, match="shape_mismatch"):
        StreamSource(FakeStream([refused("shape_mismatch")])).first(dict, {})


def test_the_first_chunk_is_not_waited_for_for_ever():
    source = StreamSource(FakeStream([RequestTimeout("slow")]), first_timeout_s=0.0)
    with pytest.raises(RequestTimeout, match="no first chunk within 0 s"):
        source.first(dict, {})
