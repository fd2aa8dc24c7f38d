"""The robots of the benchmarks: what they send, what they time, and what they do not let pass."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve

from benchmarks.questions import Examiner, Question
from benchmarks.robot_load import Load, run_round
from benchmarks.robot_socket import Refused, connect_robot, frame_of
from policy_client.codec import pack, unpack
from policy_models.spec import Observation
from policy_server.bundle import Bundle

Handler = Callable[[ServerConnection], Awaitable[None]]

KEY = "robots"
QUESTIONS = [Question(frame_of(bytes([i])), i, np.zeros((1, 1))) for i in range(4)]


async def _answer(connection: ServerConnection) -> None:
    await connection.send(b"welcome")
    async for message in connection:
        if message == b"refuse":
            await connection.send("overloaded: not now")
            await connection.close(1011)
        await connection.send(message)


@asynccontextmanager
async def _serving(answer: Handler = _answer) -> AsyncIterator[str]:
    async with serve(answer, "127.0.0.1", 0, compression=None, max_size=None) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536, 200_000])
async def test_frames_of_every_length_go_out_and_come_back(size: int) -> None:
    async with _serving() as url:
        robot = await connect_robot(url, KEY)
        payload = np.random.default_rng(size).bytes(size)
        assert (await robot.ask(frame_of(payload))).payload == payload
        robot.close()


async def test_questions_may_be_asked_before_the_last_is_answered() -> None:
    async with _serving() as url:
        robot = await connect_robot(url, KEY)
        replies = await asyncio.gather(*(robot.ask(frame_of(bytes([i]))) for i in range(50)))
        assert [reply.payload[0] for reply in replies] == list(range(50))
        robot.close()


async def test_a_refusal_is_no_answer() -> None:
    async with _serving() as url:
        robot = await connect_robot(url, KEY)
        with pytest.raises(Refused, match="overloaded: not now"):
            await robot.ask(frame_of(b"refuse"))

    async def say_nothing(connection: ServerConnection) -> None:
        await connection.close(1011)

    async with _serving(say_nothing) as url:
        with pytest.raises(Refused):
            await connect_robot(url, KEY)


async def test_a_server_answers_pings_and_robots_do_too() -> None:
    answered = asyncio.Event()

    async def ping(connection: ServerConnection) -> None:
        await (await connection.ping())
        answered.set()
        await _answer(connection)

    async with _serving(ping) as url:
        robot = await connect_robot(url, KEY)
        assert answered.is_set()
        robot.close()


async def test_at_a_rate_a_question_that_had_to_wait_is_not_quicker_for_it() -> None:
    async def stand_still(connection: ServerConnection) -> None:
        await connection.send(b"welcome")
        number = 0
        async for message in connection:
            number += 1
            if number == 5:  # the second that counts
                time.sleep(0.3)  # noqa: ASYNC251 - as a policy on the event loop does
            await connection.send(message)

    async with _serving(stand_still) as url:
        result = await asyncio.to_thread(run_round, url, QUESTIONS, Load(1, 0.5, rate_hz=50.0))
    late_ms = [latency_ms for latency_ms in result.latencies_ms if latency_ms > 15]
    assert len(result.latencies_ms) == 25
    assert len(late_ms) >= 10  # all that were due while it stood still, not only the one that it stood still for
    assert max(late_ms) > 250


async def test_without_pause_a_robot_asks_when_it_has_its_answer_and_a_flooder_is_not_counted() -> None:
    asked: list[bytes] = []

    async def listen(connection: ServerConnection) -> None:
        assert connection.request is not None
        await connection.send(b"welcome")
        async for message in connection:
            asked.append(connection.request.headers["Authorization"].encode())
            await asyncio.sleep(0.01)
            await connection.send(message)

    async with _serving(listen) as url:
        result = await asyncio.to_thread(run_round, url, QUESTIONS, Load(2, 0.3, flooders=1))
    assert 4 <= len(result.latencies_ms) <= 60
    assert len(result.latencies_ms) - 2 <= result.answered <= len(result.latencies_ms)
    assert result.flooded
    assert set(asked) == {b"Api-Key robots", b"Api-Key flood"}
    assert result.sample


class Constant:
    """A contender that answers everything with its seed's parity."""

    engine, precision = "constant", "f32"

    def prepare(self) -> None:
        pass

    def chunk(self, observation: Observation, seed: int) -> np.ndarray:
        return np.full((4, 2), 0.5 if seed % 2 else -0.5, np.float32)


def test_wrong_answers_do_not_pass(tiny_bundle: Bundle) -> None:
    examiner = Examiner(tiny_bundle, Constant(), 3)
    question = examiner.questions[0]

    def reply(**changes: object) -> bytes:
        return pack({"actions": question.actions, "seed": question.seed, **changes})

    assert examiner.check([(question, reply())]) == 1
    for wrong in ({"seed": question.seed ^ 1}, {"actions": question.actions[1:]}, {"actions": question.actions + 0.1}):
        with pytest.raises(ValueError, match="a server"):
            examiner.check([(question, reply(**wrong))])


def test_robots_send_what_the_server_reads(tiny_bundle: Bundle) -> None:
    question = Examiner(tiny_bundle, Constant(), 1).questions[0]
    assert question.frame[1] & 0x80, "a client masks its frames"
    mask, body = question.frame[4:8], question.frame[8:]
    message = unpack(bytes(byte ^ mask[i % 4] for i, byte in enumerate(body)))
    assert message.keys() == {"state", "goal", "options"}
    assert message["options"] == {"seed": question.seed}
