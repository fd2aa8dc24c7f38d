"""What a robot says and understands on a stream, without a socket."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_client import ProtocolError, StreamRefusal, pack, unpack
from policy_client.outbox import Outbox
from policy_client.stream_protocol import StreamProtocol

WELCOME = {"type": "welcome", "protocol": 1, "resume": "secret", "resumed": False, "seq": 0, "episode": 0}


def greeted(**changes):
    protocol = StreamProtocol()
    protocol.greet(pack({**WELCOME, **changes}))
    return protocol


def observe(protocol, captured_s=1.0, **more):
    return unpack(protocol.observation({"state": [0.0]}, captured_s=captured_s, **more))


def chunk(seq, episode=0, **changes):
    message = {"type": "chunk", "seq": seq, "episode": episode, "captured_ns": seq * 10**9, "step_s": 0.1}
    return pack({**message, "actions": np.full((2, 1), seq, np.float32), **changes})


def test_the_first_hello_says_only_what_was_wished():
    assert unpack(StreamProtocol().hello()) == {"type": "hello", "protocol": 1}
    wished = StreamProtocol(
        name="arm", rate_hz=50, deadline_s=0.1, continuity="rtc", options={"steps": 4, "seed": None}
    )
    assert unpack(wished.hello()) == {
        "type": "hello",
        "protocol": 1,
        "name": "arm",
        "rate_hz": 50,
        "deadline_ms": 100.0,
        "continuity": "rtc",
        "options": {"steps": 4},
    }


def test_a_later_hello_resumes_the_session_unless_it_was_ended_or_forgotten():
    protocol = greeted()
    assert unpack(protocol.hello())["resume"] == "secret"
    protocol.forget_session()
    assert "resume" not in unpack(protocol.hello())
    protocol = greeted()
    assert unpack(protocol.bye()) == {"type": "bye"}
    assert "resume" not in unpack(protocol.hello())


def test_an_observation_says_its_number_time_and_episode_and_else_only_what_was_given():
    protocol = greeted()
    message = {
        "type": "observation",
        "seq": 1,
        "episode": 0,
        "captured_ns": 1_000_000_000,
        "observation": {"state": [0]},
    }
    assert observe(protocol) == message
    given_all = observe(protocol, captured_s=2.5, playing=1, delay_s=0.25, options={"seed": np.int64(7)})
    assert given_all["seq"] == 2
    assert given_all["captured_ns"] == 2_500_000_000
    assert (given_all["playing"], given_all["delay_ms"], given_all["options"]) == (1, 250.0, {"seed": 7})


def test_an_observation_that_cannot_be_sent_uses_up_no_number():
    protocol = greeted(max_message_bytes=500)
    with pytest.raises(TypeError):
        protocol.observation({"state": object()}, captured_s=0.0)
    with pytest.raises(TypeError, match="unknown options"):
        protocol.observation({}, captured_s=0.0, options={"step": 4})
    with pytest.raises(ValueError, match="expected at most 500"):
        protocol.observation({"image": b" " * 500}, captured_s=0.0)
    assert observe(protocol)["seq"] == 1


def test_numbers_go_on_from_what_the_server_has_seen():
    protocol = greeted(seq=7, episode=2)
    assert (observe(protocol)["seq"], protocol.episode) == (8, 2)
    protocol.greet(pack(WELCOME))
    assert observe(protocol)["seq"] == 9


def test_a_set_holds_from_the_next_observation_on():
    protocol = greeted()
    assert unpack(protocol.set({"prompt": "open"}, {"steps": 5})) == {
        "type": "set",
        "revision": 1,
        "inputs": {"prompt": "open"},
        "options": {"steps": 5},
    }
    assert observe(protocol)["revision"] == 1
    protocol.set({}, {})
    assert observe(protocol)["revision"] == 2


def test_the_set_is_said_again_after_unknown_revision_and_to_a_new_session():
    protocol = greeted()
    said = protocol.set({"prompt": "open"}, {})
    observe(protocol)
    refusal = {"type": "error", "code": "unknown_revision", "message": "1", "seq": 1}
    received = protocol.receive(pack(refusal), 0.0)
    assert received.set_again == said
    assert (received.refusal.code, received.refusal.seq) == ("unknown_revision", 1)
    assert protocol.greet(pack(WELCOME)) == said


def test_a_resumed_session_hears_the_set_again_only_if_it_may_have_been_lost():
    protocol = greeted()
    said = protocol.set({"prompt": "open"}, {})
    observe(protocol)
    resumed = pack({**WELCOME, "resumed": True})
    assert protocol.greet(resumed) == said
    protocol.receive(chunk(1), 0.0)
    assert protocol.greet(resumed) is None


def test_a_refused_hello_says_why():
    with pytest.raises(StreamRefusal) as caught:
        StreamProtocol().greet(pack({"type": "error", "code": "rate_too_high", "message": "10 Hz are left"}))
    assert (caught.value.code, caught.value.message) == ("rate_too_high", "10 Hz are left")


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (pack({"policy": "beso"}), "'type' is None, expected a string"),
        (pack({"type": "chunk"}), "begins with 'chunk', expected a welcome"),
        (pack({**WELCOME, "seq": 1.5}), "the welcome's 'seq' is 1.5, expected an integer"),
        (pack({**WELCOME, "resume": 3}), "'resume' is a int, expected a string"),
        ("overloaded", "the server sent the text 'overloaded', expected a binary frame"),
        (b"\xc1", "the message cannot be read"),
    ],
)
def test_a_first_frame_that_is_no_welcome_is_refused(frame, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        StreamProtocol().greet(frame)


def test_a_chunk_is_dated_by_its_observation_and_keeps_the_rest_of_its_message():
    protocol = greeted()
    observe(protocol)
    received = protocol.receive(chunk(1, seed=7, guard={"clamped": 0}, novelty=True), 1.25)
    assert received.chunk is protocol.newest
    assert (received.chunk.made_at_s, received.chunk.step_s) == (1.0, 0.1)
    rest = {"seq": 1, "episode": 0, "captured_ns": 10**9, "seed": 7, "guard": {"clamped": 0}, "novelty": True}
    assert received.chunk.metadata == {**rest, "received_s": 1.25}


def test_a_chunk_of_an_earlier_episode_is_ignored():
    protocol = greeted()
    observe(protocol)
    assert unpack(protocol.reset()) == {"type": "reset", "episode": 1}
    assert protocol.receive(chunk(1), 0.0).ignored
    observe(protocol)
    assert protocol.receive(chunk(2, episode=1), 0.0).chunk is not None
    protocol.reset()
    assert protocol.newest is None


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (chunk("1", captured_ns=0), "the chunk's 'seq' is '1', expected an integer"),
        (chunk(True), "the chunk's 'seq' is True"),
        (chunk(1, captured_ns=None), "the chunk's 'captured_ns' is None"),
        (chunk(1, actions=np.array([[np.nan]])), "not finite"),
        (chunk(1, step_s=0), "the server's step_s is 0"),
        (pack({"type": "ping"}), "the ping's 'sent_ns' is None"),
        (pack([]), "the message is a list, expected a map"),
    ],
)
def test_nonsense_is_refused_and_forgotten(frame, complaint):
    protocol = greeted()
    with pytest.raises(ProtocolError, match=complaint):
        protocol.receive(frame, 0.0)
    assert protocol.receive(chunk(1), 0.0).chunk is not None


def test_a_ping_is_answered_with_the_time_it_came():
    pong = greeted().receive(pack({"type": "ping", "sent_ns": 5, "novelty": 1}), 1.5).pong
    assert unpack(pong) == {"type": "pong", "sent_ns": 5, "robot_ns": 1_500_000_000}


def test_unknown_messages_mean_nothing():
    received = greeted().receive(pack({"type": "novelty"}), 0.0)
    assert (received.chunk, received.refusal, received.pong, received.ignored) == (None, None, None, False)


@given(st.lists(st.integers(1, 20)), st.sets(st.integers(0, 40)))
def test_chunks_that_come_twice_late_or_never_take_nothing_back(arrivals, resets):
    protocol = greeted()
    episodes = {}
    for seq in range(1, 21):
        if seq in resets:
            protocol.reset()
        episodes[observe(protocol)["seq"]] = protocol.episode
    newest = 0
    for step, seq in enumerate(arrivals):
        if step + 20 in resets:
            protocol.reset()
        received = protocol.receive(chunk(seq, episodes[seq]), 0.0)
        assert (received.chunk is None) == received.ignored
        if received.chunk is not None:
            assert received.chunk.metadata["seq"] == seq > newest
            assert episodes[seq] == protocol.episode
            newest = seq
        assert protocol.newest is None or protocol.newest.metadata["seq"] == newest


def test_an_outbox_keeps_the_newest_of_each_kind_in_order():
    outbox = Outbox()
    assert not outbox.put("observation", b"1")
    outbox.put("set", b"2")
    assert outbox.put("observation", b"3")
    outbox.put_first("pong", b"4")
    assert [outbox.pop().frame for _ in range(3)] == [b"4", b"2", b"3"]
    assert outbox.pop() is None
    assert not outbox.discard("set")
