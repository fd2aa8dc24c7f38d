"""The player over a real stream: what the server hears, and that nothing the server does ends the loop."""

from __future__ import annotations

import itertools

import pytest

from policy_client import Backoff, ChunkPlayer, PolicyStream, StreamRefusal
from tests.contract.scripted_stream_server import answered, streaming

OBSERVATION = {"state": [0.0, 1.0]}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


def heard(server):
    messages = []
    while not server.heard.empty():
        messages.append(server.heard.get())
    return [message for message in messages if message["type"] == "observation"]


def play_until(player, holds):
    """Run at 100 Hz until something is so; return the actions."""
    return list(itertools.takewhile(lambda _: not holds(), player.run(lambda: OBSERVATION, rate_hz=100.0)))


def test_the_server_hears_which_chunk_is_played_and_when_the_answer_will_be():
    with streaming() as server, PolicyStream(server.url) as stream:
        player = ChunkPlayer(stream, execute_s=0.0)
        actions = play_until(player, lambda: player.stats.chunks >= 5)
        observations = heard(server)
        assert all(action.shape == (2,) for action in actions)
        seqs = [message["seq"] for message in observations]
        assert seqs == sorted(set(seqs))
        assert [message["playing"] for message in observations[:2]] == [0, 0]
        later = observations[2:]
        assert all(0 < message["playing"] < message["seq"] for message in later)
        assert all(message["delay_ms"] > 0 for message in later)


def test_a_refused_observation_does_not_end_the_loop(caplog):
    def refuse_the_third(message):
        if message.get("seq") == 3:
            return [{"type": "error", "code": "deadline_exceeded", "message": "too late", "seq": 3}]
        return answered(message)

    with streaming(refuse_the_third) as server, PolicyStream(server.url) as stream:
        player = ChunkPlayer(stream, execute_s=0.0)
        play_until(player, lambda: player.stats.chunks >= 4)
        assert player.stats.errors == 1
        assert caplog.messages == ["no new chunk: deadline_exceeded: too late"]


def test_a_connection_that_breaks_does_not_end_the_loop():
    def hang_up_at_the_third(message):
        return None if message.get("seq") == 3 else answered(message)

    with (
        streaming(hang_up_at_the_third) as server,
        PolicyStream(server.url, backoff=Backoff(first_s=0.01, longest_s=0.02)) as stream,
    ):
        player = ChunkPlayer(stream, execute_s=0.0)
        play_until(player, lambda: player.stats.chunks >= 4)
        assert stream.stats.reconnects == 1
        assert player.stats.errors == 0


def test_a_stream_that_is_refused_for_good_does_not_end_the_loop():
    greetings = iter([{}, {"type": "error", "code": "rate_too_high", "message": "10 Hz are left"}])

    def hang_up_at_the_third(message):
        return None if message.get("seq") == 3 else answered(message)

    with streaming(hang_up_at_the_third, lambda _: next(greetings)) as server, PolicyStream(server.url) as stream:
        player = ChunkPlayer(stream, execute_s=0.0)
        play_until(player, lambda: player.stats.errors >= 2)
        assert isinstance(stream.last_error, StreamRefusal)
