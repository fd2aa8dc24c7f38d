"""The long drive's parts, with a stream that exists in this test alone."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from benchmarks.contenders import EngineContender
from benchmarks.memory import MemoryWatch, Sample, growth, look_at
from benchmarks.questions import Judge
from benchmarks.soak import Plan
from benchmarks.soak_robot import SoakRobot, verdict
from policy_client import ActionChunk, ConnectionLost
from policy_models.spec import Observation
from policy_server.bundle import Bundle
from policy_server.engine.base import ENGINES
from policy_server.golden import draw_observation

MIB = 1 << 20


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakeStream:
    """Answers every observation at once, with the policy itself."""

    def __init__(self, judge: Judge, observations: list[Observation], robot: SoakRobot) -> None:
        self._judge = judge
        self._observations = observations
        self._inputs = robot._inputs
        self.number = 0
        self.resets = 0
        self.chunk: ActionChunk | None = None

    def send(self, observation: Mapping[str, Any], captured_s: float | None = None) -> int:
        assert captured_s is not None
        self.number += 1
        place = next(i for i, inputs in enumerate(self._inputs) if inputs is observation)
        self.answer(self.number, self._judge.answer(self._observations[place], seed=self.number), captured_s)
        return self.number

    def answer(self, number: int, actions: np.ndarray, made_at_s: float = 0.0) -> None:
        self.chunk = ActionChunk(actions, 0.05, made_at_s, {"seq": number, "seed": number, "episode": self.resets})

    def latest(self) -> ActionChunk | None:
        return self.chunk

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture(scope="module")
def judge(tiny_bundle: Bundle) -> Judge:
    return Judge(tiny_bundle, EngineContender(tiny_bundle.new_program(), ENGINES["onnx"].make(tiny_bundle, 1)))


@pytest.fixture
def observations(tiny_bundle: Bundle) -> list[Observation]:
    draw = np.random.default_rng(0)
    return [draw_observation(tiny_bundle.spec, draw) for _ in range(5)]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def robot(observations: list[Observation], clock: Clock) -> SoakRobot:
    return SoakRobot(observations, rate_hz=200.0, episode_length=10, take=1.0, seed=0, clock=clock)


def test_right_chunks_are_found_right_and_counted_once(
    robot: SoakRobot, judge: Judge, observations: list[Observation], clock: Clock
) -> None:
    stream = FakeStream(judge, observations, robot)
    for _ in range(25):
        robot.see(stream)
        clock.now_s += 0.03
        robot.hear(stream.latest())
        robot.hear(stream.latest())
    assert (robot.log.sent, robot.log.answered, stream.resets) == (25, 25, 2)
    assert robot.log.latencies_ms == pytest.approx([30.0] * 25)
    assert robot.log.longest_silence_s == pytest.approx(0.03)
    assert (robot.log.strangers, robot.log.backward) == (0, 0)
    found = verdict(judge, observations, robot.log.taken)
    assert (found.same, found.close, found.wrong) == (25, 0, 0)


def test_wrong_chunks_are_found_wrong(robot: SoakRobot, judge: Judge, observations: list[Observation]) -> None:
    stream = FakeStream(judge, observations, robot)
    for spoil in (lambda a: a + 1e-7, lambda a: a + 0.1, lambda a: a * np.nan, lambda a: a[1:]):
        robot.see(stream)
        assert stream.chunk is not None
        stream.answer(stream.number, spoil(stream.chunk.actions))
        robot.hear(stream.latest())
    found = verdict(judge, observations, robot.log.taken)
    assert (found.close, found.wrong) == (1, 3)


def test_chunks_for_nothing_that_was_sent_in_this_episode_are_told_apart(
    robot: SoakRobot, judge: Judge, observations: list[Observation]
) -> None:
    stream = FakeStream(judge, observations, robot)
    actions = judge.answer(observations[0], seed=0)
    for _ in range(11):  # the eleventh begins another episode
        robot.see(stream)
    for number, strangers, backward in ((11, 0, 0), (99, 1, 0), (10, 2, 1)):
        stream.answer(number, actions)
        robot.hear(stream.latest())
        assert (robot.log.strangers, robot.log.backward) == (strangers, backward)


def test_a_robot_whose_stream_fails_opens_another(observations: list[Observation], judge: Judge) -> None:
    robot = SoakRobot(observations, rate_hz=200.0, episode_length=10, take=1.0, seed=0)
    ended, opened = threading.Event(), []

    @contextmanager
    def open_stream() -> Iterator[FakeStream]:
        opened.append(True)
        if len(opened) == 1:
            raise ConnectionLost("cut")
        yield FakeStream(judge, observations, robot)

    driving = threading.Thread(target=robot.run, args=(open_stream, ended))
    driving.start()
    for _ in range(1000):
        if robot.log.answered >= 5 or ended.wait(0.01):
            break
    ended.set()
    driving.join(10)
    assert robot.log.failures == {"ConnectionLost": 1}
    assert robot.log.answered >= 5
    assert robot.log.strangers == 0


def test_growth_compares_the_last_third_with_what_was_held_after_the_warm_up() -> None:
    held = [50] * 10 + [100] * 50 + [104] * 39 + [900]  # MiB; one peak is no growth
    samples = [Sample(float(i), mib * MIB, 10) for i, mib in enumerate(held)]
    assert growth(samples, warm_up_s=10) == pytest.approx(1.04)
    with pytest.raises(ValueError, match="too short"):
        growth(samples, warm_up_s=90)


def test_a_process_is_watched_until_it_ends() -> None:
    with MemoryWatch(os.getpid(), every_s=0.01) as watch:
        for _ in range(500):
            if len(watch.samples) > 2 or threading.Event().wait(0.01):
                break
    assert all(sample.resident_bytes > MIB and sample.files > 2 for sample in watch.samples[:3])
    assert watch.samples[0].at_s < watch.samples[1].at_s
    with pytest.raises(FileNotFoundError):
        look_at(2**22 + 1, 0.0)


@pytest.mark.parametrize("wrong", [{"minutes": 0}, {"minutes": 1e9}, {"robots": 0}, {"load": 0}])
def test_a_drive_is_bounded(tiny_bundle: Bundle, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="minutes|robots"):
        Plan(**{"bundle": tiny_bundle, "minutes": 1, "robots": 1, "load": 0.5, "network": "clean", **wrong})
