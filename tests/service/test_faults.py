"""The network between robots and server, as bad as a test wants it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidHandshake, InvalidStatus
from websockets.http11 import Request, Response
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import Server, ServerConnection, serve

from benchmarks.fault_proxy import FaultProxy
from benchmarks.faults import OVERTAKEN_S, Fate, FaultPlan, Faults, Line

PATIENCE_S = 10.0
CLEAN = Fate(1, 0.0, overtaken=False)
KEY = {"Authorization": "Api-Key secret"}
OPEN, LOCKED = "/v1/policies/tiny/openpi", "/locked"


@pytest.fixture(scope="module")
def echo() -> Iterator[int]:
    """The port of a server that greets with the path, then sends back what it gets; 'close' makes it hang up."""

    def answer(connection: ServerConnection) -> None:
        assert connection.request is not None
        with contextlib.suppress(ConnectionClosed):
            connection.send(connection.request.path)
            for message in connection:
                if message == "close":
                    connection.close(4001, "somebody else took over")
                connection.send(message)

    def check(connection: ServerConnection, request: Request) -> Response | None:
        if request.path == LOCKED and request.headers.get("Authorization") != KEY["Authorization"]:
            response = connection.respond(401, "no key")
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        return None if request.path in (OPEN, LOCKED) else connection.respond(404, "nothing here")

    with serve(answer, "127.0.0.1", 0, process_request=check, compression=None, max_size=None) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield _port(server)
        server.shutdown()
        thread.join(PATIENCE_S)


def _port(server: Server) -> int:
    return int(server.socket.getsockname()[1])


def _robot(proxy: FaultProxy, path: str = OPEN, **options: Any) -> ClientConnection:
    # Entered by hand: websockets wants its connections entered, and some tests outlive theirs.
    return connect(proxy.url + path, compression=None, max_size=None, **options).__enter__()


def _within(condition: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < until_s:
        time.sleep(0.005)
    return condition()


def _answers(robot: ClientConnection, count: int, quiet_s: float = 0.5) -> list[bytes | str]:
    """Return the next messages: `count` of them, or those that came before it fell silent."""
    answers = []
    try:
        while len(answers) < count:
            answers.append(robot.recv(quiet_s))
    except TimeoutError:
        pass
    return answers


def _chat(robot: ClientConnection) -> None:
    for _ in range(10_000):
        robot.send(b"x" * 1000)
        robot.recv(PATIENCE_S)


BAD = Faults(delay_ms=(1, 9), drop=0.3, duplicate=0.2, reorder=0.2, cut_every_s=5, hang=0.3, seed=3)


def test_the_same_seed_gives_the_same_faults_and_another_seed_others() -> None:
    def decisions(faults: Faults, connection: str = "0 up") -> tuple[Any, ...]:
        plan = FaultPlan(faults, connection)
        return (plan.cut, *(plan.next() for _ in range(100)))

    assert decisions(BAD) == decisions(BAD)
    others = [
        decisions(Faults(delay_ms=(1, 9), drop=0.3, duplicate=0.2, reorder=0.2, cut_every_s=5, seed=4)),
        decisions(BAD, "0 down"),
        decisions(BAD, "1 up"),
    ]
    assert all(other != decisions(BAD) for other in others)


def test_one_fault_does_not_shift_the_luck_of_another() -> None:
    plans = [FaultPlan(Faults(drop=0.3, duplicate=doubled, seed=1), "0 up") for doubled in (0.0, 0.9)]
    dropped = [[plan.next().copies == 0 for _ in range(200)] for plan in plans]
    assert dropped[0] == dropped[1]


def test_faults_come_as_often_as_they_were_asked_for() -> None:
    plan = FaultPlan(Faults(delay_ms=(2, 4), drop=0.1, reorder=0.2, duplicate=0.5), "0 up")
    fates = [plan.next() for _ in range(4000)]
    arrived = [fate for fate in fates if fate.copies]
    assert 0.08 < 1 - len(arrived) / len(fates) < 0.12
    assert 0.46 < sum(fate.copies == 2 for fate in arrived) / len(arrived) < 0.54
    assert 0.17 < sum(fate.overtaken for fate in arrived) / len(arrived) < 0.23
    assert all(0.002 <= fate.delay_s <= 0.004 for fate in fates)


@pytest.mark.parametrize("spare_first", [True, False])
def test_the_first_message_is_lost_only_if_asked_for(spare_first: bool) -> None:
    plan = FaultPlan(Faults(drop=1.0, spare_first=spare_first), "0 up")
    assert [plan.next().copies for _ in range(3)] == [int(spare_first), 0, 0]


@pytest.mark.parametrize(
    "settings",
    [{"drop": 1.5}, {"torn": 0.8, "hang": 0.8}, {"delay_ms": (5, 1)}, {"bytes_per_s": 0}, {"cut_every_s": -1.0}],
)
def test_impossible_faults_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Faults(**settings)


def test_a_delay_alone_keeps_the_order() -> None:
    line = Line()
    for message, delay_s in (("slow", 0.5), ("quick", 0.1)):
        line.push(message, Fate(1, delay_s, overtaken=False), now_s=10.0)
    assert line.pop(10.4) is None
    assert line.due_at_s == 10.5
    assert [line.pop(10.5), line.pop(10.5), line.pop(10.5)] == ["slow", "quick", None]
    assert (line.due_at_s, line.waiting_bytes) == (None, 0)


def test_an_overtaken_message_follows_the_next_one_or_goes_on_alone() -> None:
    line = Line()
    line.push("first", Fate(1, 0.0, overtaken=True), now_s=1.0)
    assert line.pop(1.0) is None
    line.push("second", CLEAN, now_s=1.01)
    assert [line.pop(1.01), line.pop(1.01)] == ["second", "first"]
    line.push("alone", Fate(1, 0.0, overtaken=True), now_s=2.0)
    assert line.pop(2.0) is None
    assert line.due_at_s == 2.0 + OVERTAKEN_S
    assert line.pop(2.0 + OVERTAKEN_S) == "alone"


def test_a_narrow_line_lets_through_so_many_bytes_a_second() -> None:
    line = Line(bytes_per_s=100)
    for _ in range(2):
        line.push(b"x" * 50, CLEAN, now_s=0.0)
    assert [line.pop(0.4), line.pop(0.5), line.pop(0.9), line.pop(1.0)] == [None, b"x" * 50, None, b"x" * 50]


def test_without_faults_all_arrives_once_and_in_order(echo: int) -> None:
    messages = [*map(str, range(150)), *(bytes([i]) * 1000 * i for i in range(50))]
    with FaultProxy(echo) as proxy, _robot(proxy) as robot:
        assert robot.recv(PATIENCE_S) == OPEN
        for message in messages:
            robot.send(message)
        assert _answers(robot, len(messages), PATIENCE_S) == messages
        assert (proxy.counts.connections, proxy.counts.up.forwarded) == (1, 200)
        assert _within(lambda: proxy.counts.down.forwarded == 201)
        assert proxy.counts.up.dropped == proxy.counts.down.dropped == 0


def test_the_order_holds_while_messages_are_delayed_lost_and_doubled(echo: int) -> None:
    faults = Faults(delay_ms=(0, 3), drop=0.1, duplicate=0.1, seed=1)
    with FaultProxy(echo, up=faults) as proxy, _robot(proxy) as robot:
        for i in range(200):
            robot.send(str(i))
        up = proxy.counts.up
        assert _within(lambda: up.forwarded == up.received - up.dropped + up.duplicated and up.received == 200)
        assert 5 < up.dropped < 40 and 5 < up.duplicated < 40
        numbers = [int(answer) for answer in _answers(robot, 1 + up.forwarded, PATIENCE_S)[1:]]
    assert numbers == sorted(numbers)
    assert (len(set(numbers)), len(numbers)) == (200 - up.dropped, up.forwarded)


def test_reordered_messages_arrive_and_in_another_order(echo: int) -> None:
    with FaultProxy(echo, down=Faults(reorder=0.2, seed=1)) as proxy, _robot(proxy) as robot:
        for i in range(100):
            robot.send(str(i))
        numbers = [int(answer) for answer in _answers(robot, 101, PATIENCE_S)[1:]]
        assert proxy.counts.down.reordered > 5
    assert numbers != sorted(numbers) == list(range(100))


def test_two_runs_of_one_seed_lose_the_same_messages(echo: int) -> None:
    def survivors() -> list[bytes | str]:
        with FaultProxy(echo, up=Faults(drop=0.5, seed=9)) as proxy, _robot(proxy) as robot:
            for i in range(100):
                robot.send(str(i))
            assert _within(lambda: proxy.counts.up.received == 100)
            return _answers(robot, 101 - proxy.counts.up.dropped, PATIENCE_S)

    assert survivors() == survivors()


def test_refused_upgrades_reach_the_robot_as_they_are_and_keys_reach_the_server(echo: int) -> None:
    with FaultProxy(echo) as proxy:
        for path, status, body in ((LOCKED, 401, b"no key"), ("/nowhere", 404, b"nothing here")):
            with pytest.raises(InvalidStatus) as refused:
                _robot(proxy, path)
            response = refused.value.response
            assert (response.status_code, response.body) == (status, body)
            assert ("WWW-Authenticate" in response.headers) == (status == 401)
        with _robot(proxy, LOCKED, additional_headers=KEY) as robot:
            assert robot.recv(PATIENCE_S) == LOCKED
        assert (proxy.counts.refused, proxy.counts.connections) == (2, 1)


def test_close_codes_pass_and_nobody_is_let_in_when_nothing_listens(echo: int) -> None:
    with FaultProxy(echo, down=Faults(delay_ms=(20, 20))) as proxy, _robot(proxy) as robot:
        robot.send("close")
        assert robot.recv(PATIENCE_S) == OPEN
        with pytest.raises(ConnectionClosedError) as closed:
            robot.recv(PATIENCE_S)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "somebody else took over")
    with FaultProxy(1) as proxy, pytest.raises(InvalidHandshake):  # nothing listens on port 1
        _robot(proxy)


def test_the_close_code_of_a_robot_reaches_the_server() -> None:
    codes: list[int] = []

    def listen(connection: ServerConnection) -> None:
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(PATIENCE_S)
        codes.append(closed.value.rcvd.code if closed.value.rcvd else 1006)

    with serve(listen, "127.0.0.1", 0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with FaultProxy(_port(server)) as proxy:
            _robot(proxy).close(4242)
            assert _within(lambda: len(codes) == 1)
            _robot(proxy).socket.close()
            assert _within(lambda: len(codes) == 2)
        server.shutdown()
    assert codes == [4242, 1006]


@pytest.mark.parametrize(("torn", "counted"), [(0.0, "aborted"), (1.0, "torn")])
def test_a_cut_ends_the_connection_without_a_word_and_the_next_one_works(echo: int, torn: float, counted: str) -> None:
    with FaultProxy(echo, down=Faults(cut_every_s=0.05, torn=torn, seed=2)) as proxy:
        for _ in range(3):
            with _robot(proxy) as robot, pytest.raises(ConnectionClosedError) as closed:
                _chat(robot)
            assert closed.value.rcvd is None
        assert (proxy.counts.connections, getattr(proxy.counts.down, counted)) == (3, 3)


def test_a_cut_on_demand(echo: int) -> None:
    with FaultProxy(echo) as proxy, _robot(proxy) as robot:
        assert robot.recv(PATIENCE_S) == OPEN
        assert proxy.cut() == 1
        with pytest.raises(ConnectionClosedError):
            robot.recv(PATIENCE_S)
        assert _within(lambda: proxy.cut() == 0)


def test_a_hung_direction_says_nothing_closes_nothing_and_ends_at_last(echo: int) -> None:
    with FaultProxy(echo, up=Faults(cut_every_s=1e-3, torn=0.0, hang=1.0, hang_s=0.4)) as proxy:
        robot = _robot(proxy, ping_interval=None)
        assert robot.recv(PATIENCE_S) == OPEN
        assert _within(lambda: proxy.counts.up.hung == 1)
        robot.send("hello?")
        with pytest.raises(TimeoutError):
            robot.recv(0.1)
        assert not robot.ping().wait(0.05)
        with pytest.raises(ConnectionClosedError):
            robot.recv(PATIENCE_S)
        robot.close()
        assert proxy.counts.up.received == 0
