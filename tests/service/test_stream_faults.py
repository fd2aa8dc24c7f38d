"""Streams over bad networks: what arrives is right, whatever is lost, doubled, late, overtaken or cut off."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.fault_proxy import FaultProxy
from benchmarks.faults import Faults
from policy_client import ActionChunk, Backoff, ChunkPlayer, PolicyStream, StreamState
from tests.conftest import RunningServer
from tests.service.robot import PATIENCE_S, TINY
from tests.service.stream_robot import StreamRobot, recomputed

QUICK = Backoff(first_s=0.01, longest_s=0.05)
# What a bad network may bring about. Anything else would be a mistake of ours.
PASSING = {"connection_lost", "connect_failed", "request_timeout", "unknown_revision"}


class WatchedStream(PolicyStream):
    """Remembers what was sent and what came.

    Attributes:
        sent: Each observation by its number, with what was set when it was sent.
        came: Every chunk.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.sent: dict[int, dict[str, Any]] = {}
        self.came: list[ActionChunk] = []
        self._inputs: dict[str, Any] = {}
        settings = {"backoff": QUICK, "silence_timeout_s": 1.5, **options}
        super().__init__(f"{url}/v1/policies/tiny/stream", on_chunk=self.came.append, **settings)

    def set(self, inputs: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().set(inputs, **options)
        self._inputs = dict(inputs or {})

    def send(self, observation: Mapping[str, Any], **options: Any) -> int:
        seq = super().send(observation, **options)
        self.sent[seq] = {**self._inputs, **observation}
        return seq

    def check(self, http: httpx.Client) -> None:
        """Compute every chunk that came once more, at another door."""
        numbers = [chunk.metadata["seq"] for chunk in self.came]
        assert numbers == sorted(set(numbers))
        for chunk in self.came:
            observation = self.sent[chunk.metadata["seq"]]
            np.testing.assert_array_equal(chunk.actions, recomputed(http, observation, chunk.metadata))
        assert set(self.stats.errors) <= PASSING, self.stats.errors


def _within(condition: Callable[[], object]) -> bool:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.005)
    return True


def _observation(n: int) -> dict[str, np.ndarray]:
    return {"state": np.array([np.sin(n), np.cos(n), 0.1 * np.sin(3 * n), n / 200], np.float32)}


def _goal(n: int) -> dict[str, np.ndarray]:
    return {"goal": np.array([np.cos(n), np.sin(n), 0, 0], np.float32)}


BAD = {
    "losses": Faults(drop=0.3, seed=1),
    "duplicates": Faults(duplicate=0.5, seed=2),
    "another order": Faults(reorder=0.3, seed=3),
    "delays": Faults(delay_ms=(0, 60), seed=4),
    "cuts": Faults(cut_every_s=0.4, torn=0.5, seed=5),
    "everything": Faults((0, 20), drop=0.1, duplicate=0.1, reorder=0.1, cut_every_s=0.8, torn=0.3, seed=6),
}


@pytest.mark.parametrize("faults", BAD.values(), ids=BAD)
def test_every_chunk_that_arrives_answers_its_own_observation(
    server: RunningServer, http: httpx.Client, faults: Faults
) -> None:
    with FaultProxy(server.port, up=faults, down=faults) as proxy, StreamRobot(server) as neighbour:
        wanted = neighbour.actions(TINY, seed=7)
        with WatchedStream(proxy.url) as stream:
            for n in range(120):
                if n % 10 == 0:
                    stream.set(_goal(n) if n % 20 else None)
                seq = stream.send(_observation(n))
                time.sleep(0.008)
            assert _within(lambda: stream.state is StreamState.OPEN)
            # In the end what gets through is answered, whatever was lost before.
            assert _within(lambda: _answered(stream, seq) or _answered(stream, stream.send(_observation(0))))
            np.testing.assert_array_equal(neighbour.actions(TINY, seed=7), wanted)
            reconnects = stream.stats.reconnects
        stream.check(http)
        assert len(stream.came) > 10
        assert (reconnects > 0) == (faults.cut_every_s is not None)
        counts = (proxy.counts.up, proxy.counts.down)
        assert all(count.dropped for count in counts) or not faults.drop
        assert all(count.duplicated for count in counts) or not faults.duplicate
        assert all(count.reordered for count in counts) or not faults.reorder


def _answered(stream: PolicyStream, seq: int) -> bool:
    newest = stream.latest()
    until_s = time.monotonic() + 0.3
    while time.monotonic() < until_s:
        newest = stream.latest()
        if newest is not None and newest.metadata["seq"] >= seq:
            return True
        time.sleep(0.005)
    return False


def test_a_session_and_its_episode_survive_every_cut(server: RunningServer, http: httpx.Client) -> None:
    with FaultProxy(server.port) as proxy, WatchedStream(proxy.url) as stream:
        stream.set(_goal(1))
        stream.reset()
        session = stream.welcome["session"]
        for n in range(6):
            seq = stream.send(_observation(n))
            chunk = stream.wait_for(seq, PATIENCE_S)
            assert (chunk.metadata["seq"], chunk.metadata["episode"], chunk.metadata["stale"]) == (seq, 1, 0)
            assert proxy.cut() == 1
            assert _within(lambda n=n: stream.stats.reconnects == n + 1)
            assert (stream.welcome["session"], stream.welcome["resumed"]) == (session, True)
        stream.check(http)
        assert set(stream.stats.errors) == {"connection_lost"}


def test_a_server_that_forgot_the_session_is_told_everything_again(server: RunningServer, http: httpx.Client) -> None:
    with FaultProxy(server.port) as proxy, WatchedStream(proxy.url) as stream:
        stream.set(_goal(1))
        stream.reset()
        stream.wait_for(stream.send(_observation(1)), PATIENCE_S)
        with StreamRobot(server, resume=stream.welcome["resume"]) as intruder:  # ends it meanwhile
            intruder.send("bye")
            intruder.close_code()
        assert _within(lambda: stream.stats.reconnects == 1)
        assert not stream.welcome["resumed"]
        seq = stream.send(_observation(2))
        assert stream.wait_for(seq, PATIENCE_S).metadata["episode"] == 1
        stream.check(http)
        assert set(stream.stats.errors) == {"connection_lost"}


def test_a_player_plays_on_over_a_bad_network(server: RunningServer, http: httpx.Client) -> None:
    faults = Faults((0, 30), drop=0.1, duplicate=0.1, reorder=0.1, seed=9)
    seen: list[np.ndarray] = []

    def observe() -> dict[str, np.ndarray]:
        return _observation(len(seen))

    with FaultProxy(server.port, up=faults, down=faults) as proxy, WatchedStream(proxy.url) as stream:
        player = ChunkPlayer(stream, execute_s=0.0)
        for action in player.run(observe, rate_hz=50):
            seen.append(action)
            if len(seen) % 30 == 0:
                assert _within(lambda: stream.stats.reconnects == len(seen) // 30 - 1)
                if len(seen) == 90:
                    break
                proxy.cut()
        assert player.stats.ticks == 90
        assert player.stats.chunks > 5
    stream.check(http)
    rows = {row.tobytes() for chunk in stream.came for row in chunk.actions}
    assert {action.tobytes() for action in seen} <= rows
