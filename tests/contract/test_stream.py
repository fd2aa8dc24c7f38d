"""The stream's client against a real websocket server."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest

from policy_client import (
    Backoff,
    ConnectFailed,
    ConnectionLost,
    PolicyStream,
    RequestTimeout,
    StreamRefusal,
    StreamState,
)
from tests.contract.scripted_stream_server import WAIT_S, answered, chunk, silent, streaming

OBSERVATION = {"state": np.arange(4, dtype=np.float32)}
QUICK = Backoff(first_s=0.01, longest_s=0.02)


@pytest.fixture(autouse=True)
def no_thread_is_left_behind(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    before = set(threading.enumerate())
    yield
    eventually(lambda: set(threading.enumerate()) <= before)


def eventually(holds):
    until_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until_s, "it never came true"
        time.sleep(0.005)


def refused(code):
    return lambda _hello: {"type": "error", "code": code, "message": "no"}


def test_an_observation_is_answered_by_a_chunk_with_its_number_and_time():
    with streaming() as server, PolicyStream(server.url, backoff=QUICK) as stream:
        seq = stream.send(OBSERVATION, captured_s=12.5, playing=0, delay_s=0.06, steps=3)
        answer = stream.wait_for(seq, WAIT_S)
        assert stream.latest() is answer
        assert answer.made_at_s == 12.5
        assert answer.actions.tolist() == [[1, 1]] * 4
        assert {"seq": 1, "episode": 0, "seed": 7}.items() <= answer.metadata.items()
        assert answer.metadata["timings"] == {"total_ms": 2.4}
        sent = server.hear()
        assert {"seq": 1, "captured_ns": 12_500_000_000, "playing": 0, "delay_ms": 60.0}.items() <= sent.items()
        assert sent["options"] == {"steps": 3}
        np.testing.assert_equal(sent["observation"], OBSERVATION)
        assert stream.stats.sent == stream.stats.chunks == 1


def test_the_hello_says_what_the_robot_wishes_and_the_welcome_can_be_read():
    with streaming(greet=lambda _: {"policy": "hold", "novelty": [1]}) as server:
        stream = PolicyStream(
            server.url, name="arm", rate_hz=20, deadline_s=0.2, continuity={"mode": "rtc"}, options={"steps": 4}
        )
        with stream:
            assert stream.welcome["policy"] == "hold"
        wishes = {"name": "arm", "rate_hz": 20, "deadline_ms": 200.0, "continuity": {"mode": "rtc"}}
        assert server.hellos == [{"type": "hello", "protocol": 1, **wishes, "options": {"steps": 4}}]


def test_a_connection_that_breaks_is_made_again_and_the_session_goes_on():
    def hang_up_once(message):
        return None if message.get("seq") == 2 else answered(message)

    with streaming(hang_up_once) as server, PolicyStream(server.url, backoff=QUICK) as stream:
        stream.wait_for(stream.send(OBSERVATION), WAIT_S)
        stream.send(OBSERVATION)
        eventually(lambda: stream.stats.reconnects == 1)
        seq = stream.send(OBSERVATION)
        assert seq == 3
        stream.wait_for(seq, WAIT_S)
        assert [hello.get("resume") for hello in server.hellos] == [None, "token-1"]
        assert stream.welcome["resumed"] is True
        assert stream.stats.errors == {"connection_lost": 1}
        assert isinstance(stream.last_error, ConnectionLost)


def test_a_set_is_said_again_to_a_server_that_has_forgotten_the_session():
    with streaming() as server, PolicyStream(server.url, backoff=QUICK) as stream:
        stream.set({"prompt": "open the drawer"}, steps=5)
        stream.wait_for(stream.send(OBSERVATION), WAIT_S)
        said = server.hear("set")
        assert (said["revision"], said["inputs"], said["options"]) == (1, {"prompt": "open the drawer"}, {"steps": 5})
        assert server.hear()["revision"] == 1
        server.sessions.clear()
        server.connections[-1].close()
        assert server.hear("set") == said
        eventually(lambda: stream.state is StreamState.OPEN)
        stream.wait_for(stream.send(OBSERVATION), WAIT_S)


def test_a_set_that_was_lost_is_said_again_when_the_server_misses_it():
    known = []

    def answer(message):
        if message["type"] == "set":
            known.extend([message["revision"]] if server.heard.qsize() > 1 else [])
        elif message["type"] == "observation" and message.get("revision") not in known:
            return [{"type": "error", "code": "unknown_revision", "message": "what?", "seq": message["seq"]}]
        return answered(message)

    with streaming(answer) as server, PolicyStream(server.url, backoff=QUICK) as stream:
        stream.set({"prompt": "open the drawer"})
        seq = stream.send(OBSERVATION)
        with pytest.raises(StreamRefusal) as caught:
            stream.wait_for(seq, WAIT_S)
        assert (caught.value.code, caught.value.seq) == ("unknown_revision", seq)
        stream.wait_for(stream.send(OBSERVATION), WAIT_S)
        assert stream.stats.errors == {"unknown_revision": 1}


def test_pings_are_answered_with_the_robots_clock():
    with streaming() as server, PolicyStream(server.url):
        before_ns = time.monotonic_ns()
        server.say({"type": "ping", "sent_ns": 42})
        pong = server.hear("pong")
        assert pong["sent_ns"] == 42
        assert before_ns <= pong["robot_ns"] <= time.monotonic_ns()


def test_the_newest_observation_wins_while_the_network_is_stuck():
    unstuck = threading.Event()

    def read_no_more(message):
        if message.get("seq") == 1:
            unstuck.wait(WAIT_S)
        return answered(message)

    large = {"image": np.zeros(16 << 20, np.uint8)}
    with streaming(read_no_more, max_size=None) as server, PolicyStream(server.url) as stream:
        stream.send(OBSERVATION)
        server.hear()
        for _ in range(4):  # the first of them fills every buffer on the way and is stuck
            stream.send(large)
            eventually(lambda: stream.stats.sent == 1)
        last = stream.send(OBSERVATION)
        unstuck.set()
        assert stream.wait_for(last, WAIT_S).metadata["seq"] == last
        assert stream.stats.superseded >= 2
        assert stream.stats.sent + stream.stats.superseded == last


def test_a_reset_begins_an_episode_and_late_chunks_of_the_one_before_are_ignored():
    with streaming(silent) as server, PolicyStream(server.url) as stream:
        stream.send(OBSERVATION)
        old = server.hear()
        stream.reset()
        assert server.hear("reset")["episode"] == 1
        server.say(chunk(old))
        eventually(lambda: stream.stats.ignored == 1)
        assert stream.latest() is None
        seq = stream.send(OBSERVATION)
        server.say(chunk(server.hear()))
        assert stream.wait_for(seq, WAIT_S).metadata["episode"] == 1


def test_a_cancel_gives_up_all_observations_so_far():
    with streaming(silent) as server, PolicyStream(server.url) as stream:
        seq = stream.send(OBSERVATION)
        stream.cancel()
        assert server.hear("cancel")["seq"] == seq


@pytest.mark.parametrize("code", ["rate_too_high", "unsupported_protocol"])
def test_a_refused_hello_is_reported_and_not_said_again(code):
    with streaming(greet=refused(code)) as server:
        stream = PolicyStream(server.url, backoff=QUICK)
        with pytest.raises(StreamRefusal, match=f"{code}: no"):
            stream.connect()
        assert stream.state is StreamState.CLOSED
        with pytest.raises(StreamRefusal):
            stream.send(OBSERVATION)
        assert len(server.hellos) == 1


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_upgrade_is_reported_and_not_tried_again(status):
    tried = []

    def refuse(connection, request):
        tried.append(request.headers.get("Authorization"))
        return connection.respond(status, "no\n")

    with streaming(process_request=refuse) as server:
        with pytest.raises(ConnectFailed) as caught:
            PolicyStream(server.url, api_key="wrong", backoff=QUICK).connect()
        assert caught.value.status == status
        assert tried == ["Api-Key wrong"]


def test_a_server_that_is_not_ready_is_tried_until_it_is():
    statuses = iter([503, 503])

    def starting(connection, _request):
        status = next(statuses, None)
        return connection.respond(status, "warming up\n") if status else None

    with streaming(process_request=starting) as server, PolicyStream(server.url, backoff=QUICK) as stream:
        assert stream.state is StreamState.OPEN
        assert stream.stats.reconnects == 0


def test_a_refusal_while_connecting_again_ends_the_stream():
    greetings = iter([{}, {"type": "error", "code": "rate_too_high", "message": "10 Hz are left"}])
    with streaming(greet=lambda _: next(greetings)) as server:
        with PolicyStream(server.url, backoff=QUICK) as stream:
            server.connections[-1].close()
            eventually(lambda: stream.state is StreamState.CLOSED)
            with pytest.raises(StreamRefusal, match="10 Hz are left"):
                stream.send(OBSERVATION)
        assert len(server.hellos) == 2


def test_a_session_taken_over_is_left_to_its_taker():
    def taken(message):
        return None if message["type"] == "cancel" else answered(message)

    with streaming(taken) as server, PolicyStream(server.url, backoff=QUICK) as stream:
        server.close_code = 4001
        stream.cancel()
        eventually(lambda: stream.stats.reconnects == 1)
        assert "resume" not in server.hellos[-1]


def test_a_connection_on_which_nothing_comes_is_given_up():
    with streaming(silent) as server, PolicyStream(server.url, backoff=QUICK, silence_timeout_s=0.1) as stream:
        eventually(lambda: stream.stats.reconnects >= 1)
        assert str(stream.last_error) == "no sign of the server within 0.1 s"


def test_nonsense_is_counted_and_the_conversation_goes_on():
    def nonsense(message):
        return [b"\xc1", {"type": "chunk"}, {"type": "novelty"}, {}, *answered(message)]

    heard = []
    with streaming(nonsense) as server, PolicyStream(server.url, on_chunk=heard.append) as stream:
        newest = stream.wait_for(stream.send(OBSERVATION), WAIT_S)
        eventually(lambda: heard == [newest])
        assert stream.stats.errors == {"protocol_error": 3}
        assert len(server.hellos) == 1


def test_a_listener_that_fails_hurts_nobody(caplog):
    def fail(_news):
        raise ZeroDivisionError

    with streaming() as server, PolicyStream(server.url, on_chunk=fail) as stream:
        stream.wait_for(stream.send(OBSERVATION), WAIT_S)
        stream.wait_for(stream.send(OBSERVATION), WAIT_S)
    assert "a listener of the stream failed" in caplog.messages


def test_closing_says_goodbye_and_a_closed_stream_takes_nothing_until_it_is_connected_again():
    with streaming() as server:
        stream = PolicyStream(server.url)
        with pytest.raises(ConnectionLost, match="this stream is closed"):
            stream.send(OBSERVATION)
        with stream:
            pass
        server.hear("bye")
        assert stream.state is StreamState.CLOSED
        with pytest.raises(ConnectionLost, match="this stream is closed"):
            stream.wait_for(1, WAIT_S)
        with stream:
            stream.wait_for(stream.send(OBSERVATION), WAIT_S)
        assert "resume" not in server.hellos[-1]


def test_a_stream_closed_while_the_connection_is_lost_does_not_resume_when_connected_again():
    statuses = iter([None, 503])

    def gone(connection, _request):
        status = next(statuses, None)
        return connection.respond(status, "restarting\n") if status else None

    with streaming(silent, process_request=gone) as server:
        stream = PolicyStream(server.url, backoff=Backoff(first_s=60.0, longest_s=60.0))
        stream.connect()
        server.connections[-1].close()
        eventually(lambda: stream.state is StreamState.LOST)
        stream.send(OBSERVATION)
        stream.close()
        next(statuses, None)
        with stream:
            stream.cancel()
            server.hear("cancel")
        assert stream.stats.sent == 0
        assert "resume" not in server.hellos[-1]


def test_waiting_for_a_chunk_has_an_end():
    with streaming(silent) as server, PolicyStream(server.url) as stream:
        seq = stream.send(OBSERVATION)
        with pytest.raises(RequestTimeout, match=r"no chunk for observation 1 within 0\.05 s"):
            stream.wait_for(seq, 0.05)


def test_closing_ends_the_wait_for_a_chunk():
    with streaming(silent) as server, PolicyStream(server.url) as stream:
        seq = stream.send(OBSERVATION)
        closing = threading.Timer(0.05, stream.close)
        closing.start()
        with pytest.raises(ConnectionLost, match="this stream is closed"):
            stream.wait_for(seq, WAIT_S)
        closing.join()


def connect_elsewhere(stream):
    outcomes = []

    def connect():
        try:
            stream.connect()
        except ConnectionLost as error:
            outcomes.append(str(error))

    thread = threading.Thread(target=connect)
    thread.start()
    return thread, outcomes


def test_closing_while_the_handshake_hangs_ends_the_attempt():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        stream = PolicyStream(f"ws://127.0.0.1:{listening.getsockname()[1]}/stream", connect_timeout_s=60.0)
        connecting, outcomes = connect_elsewhere(stream)
        eventually(lambda: stream._connection is not None)
        stream.close()
        connecting.join(WAIT_S)
        assert outcomes == ["this stream is closed"]


def test_closing_ends_the_pause_between_attempts():
    def not_ready(connection, _request):
        return connection.respond(503, "warming up\n")

    with streaming(process_request=not_ready) as server:
        stream = PolicyStream(server.url, connect_timeout_s=600.0, backoff=Backoff(first_s=60.0, longest_s=60.0))
        connecting, outcomes = connect_elsewhere(stream)
        eventually(lambda: stream.last_error is not None)
        stream.close()
        connecting.join(WAIT_S)
        assert outcomes == ["this stream is closed"]


def test_an_observation_larger_than_the_server_takes_is_refused_at_once():
    with streaming(greet=lambda _: {"max_message_bytes": 1000}) as server, PolicyStream(server.url) as stream:
        with pytest.raises(ValueError, match="expected at most 1000"):
            stream.send({"image": np.zeros(2000, np.uint8)})
        stream.wait_for(stream.send(OBSERVATION), WAIT_S)
