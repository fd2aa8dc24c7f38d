"""Connections that go wrong: oversized, cut off, silent, or too many. Other robots notice nothing."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from policy_client.codec import pack
from policy_server.bundle import Bundle
from tests.conftest import Launch, RunningServer
from tests.service.robot import PATIENCE_S, SLOWLY, TINY, Refusal, Robot, refusal_of

StillServing = Callable[[], None]
LIMIT_BYTES = 16 << 20
MASK = bytes(4)
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
ACT = b"POST /v1/policies/tiny/act HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def _frame(first_byte: int, payload: bytes = b"", claimed_bytes: int | None = None) -> bytes:
    length = len(payload) if claimed_bytes is None else claimed_bytes
    return struct.pack(">BBQ", first_byte, 0x80 | 127, length) + MASK + payload


BINARY, FIRST_PART, NEXT_PART, RESERVED = 0x82, 0x02, 0x00, 0xF2


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ([_frame(BINARY, claimed_bytes=1 << 30)], 1009),
        ([_frame(BINARY, claimed_bytes=LIMIT_BYTES + 1)], 1009),
        ([_frame(FIRST_PART, bytes(1 << 20))] + [_frame(NEXT_PART, bytes(1 << 20))] * 16, 1009),
        ([struct.pack(">BBQ", BINARY, 127, 10) + bytes(10)], 1002),
        ([_frame(RESERVED, b"x")], 1002),
        ([_frame(0x81, b"\xff\xfe")], 1007),
    ],
    ids=["a gigabyte", "one byte too many", "many parts", "an unmasked frame", "reserved bits", "text that is no text"],
)
def test_a_frame_that_may_not_be_closes_its_connection_and_costs_no_memory(
    server: RunningServer, assert_still_serving: StillServing, sent: list[bytes], code: int
) -> None:
    before_kib = _resident_kib(server)
    with _upgraded(server) as raw:
        with contextlib.suppress(ConnectionError):  # it may hang up before everything is sent
            for part in sent:
                raw.sendall(part)
        assert _close_code(_read_to_end(raw)) == code
        assert_still_serving()
    assert _resident_kib(server) - before_kib < 64 << 10


def test_a_message_up_to_the_limit_is_read(server: RunningServer) -> None:
    with Robot(server) as robot:
        robot.send(TINY, padding=bytes(LIMIT_BYTES - 1000))
        assert robot.refusal().code == "unexpected_input"


def test_a_body_that_announces_too_much_is_refused_before_it_is_sent(
    server: RunningServer, assert_still_serving: StillServing
) -> None:
    with _connected(server) as raw:
        raw.sendall(ACT + b"Content-Length: 1000000000\r\n\r\n")
        refusal = _refusal(_read_to_end(raw, until=b"}}"))
    assert (refusal.status, refusal.code) == (413, "message_too_big")
    assert f"at most {LIMIT_BYTES} bytes, got 1000000000 bytes" in refusal.message
    assert_still_serving()


def test_a_body_without_a_length_is_refused_once_it_is_too_long(
    server: RunningServer, assert_still_serving: StillServing
) -> None:
    before_kib = _resident_kib(server)
    with _connected(server) as raw:
        raw.sendall(ACT + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(17):
                raw.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
        refusal = _refusal(_read_to_end(raw, until=b"}}"))
    assert (refusal.status, refusal.code) == (413, "message_too_big")
    assert_still_serving()
    assert _resident_kib(server) - before_kib < 64 << 10


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HT",
        UPGRADE[:-2],
        UPGRADE,
        ACT + b'Content-Length: 1000\r\n\r\n{"observation":',
        ACT + b"Transfer-Encoding: chunked\r\n\r\n10\r\n{",
    ],
    ids=["before a word", "in the request line", "in the upgrade", "after the upgrade", "in a body", "in a chunk"],
)
def test_a_client_that_dies_in_the_middle_of_a_request_disturbs_nobody(
    server: RunningServer, assert_still_serving: StillServing, sent: bytes
) -> None:
    for _ in range(5):
        with _connected(server) as raw:
            raw.sendall(sent)
            _die(raw)
    assert_still_serving()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x82",
        _frame(BINARY, pack(TINY)[:20], claimed_bytes=len(pack(TINY))),
        _frame(FIRST_PART, pack(TINY)),
        _frame(BINARY, pack(TINY)),
        _frame(BINARY, pack({**TINY, "options": SLOWLY})) * 5,
    ],
    ids=["after one byte", "in a frame", "between two parts", "before the answer", "before five answers"],
)
def test_a_robot_that_dies_in_the_middle_of_a_frame_disturbs_nobody(
    server: RunningServer, assert_still_serving: StillServing, sent: bytes
) -> None:
    for _ in range(5):
        with _upgraded(server) as raw:
            raw.sendall(sent)
            _die(raw)
    assert_still_serving()


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x00" * 1000, b"ping\n\n"])
def test_a_client_that_speaks_something_else_is_turned_away(
    server: RunningServer, assert_still_serving: StillServing, sent: bytes
) -> None:
    with _connected(server) as raw:
        raw.sendall(sent)
        answer = _read_to_end(raw)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"Traceback" not in answer
    assert_still_serving()


def test_clients_that_connect_and_say_nothing_disturb_nobody(
    server: RunningServer, assert_still_serving: StillServing
) -> None:
    with contextlib.ExitStack() as stack:
        for sent in (b"", b"GET /v1/pol", UPGRADE[:40], UPGRADE) * 50:
            stack.enter_context(_connected(server)).sendall(sent)
        assert_still_serving()
    assert_still_serving()


def test_a_robot_killed_in_mid_inference_does_not_disturb_another(launch: Launch, slow_bundle: Bundle) -> None:
    server = launch(slow_bundle.path, "--engine", "onnx")
    with Robot(server) as other:
        wanted = other.actions(TINY, seed=7)
        victim = subprocess.Popen(
            [sys.executable, "-c", _VICTIM, server.websocket_url], stdout=subprocess.PIPE, cwd=Path.cwd()
        )
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"the server works on it\n"
        victim.send_signal(signal.SIGKILL)
        victim.wait(PATIENCE_S)
        victim.stdout.close()
        assert (other.actions(TINY, seed=7) == wanted).all()
    assert server.stop() == 0
    log = server.log()
    assert "Traceback" not in log
    assert "ERROR" not in log


def test_the_log_stays_readable_whatever_clients_do(launch: Launch, tiny_bundle: Bundle) -> None:
    server = launch(tiny_bundle.path, "--engine", "onnx")
    for sent in (
        _frame(BINARY, b"\xc1"),
        _frame(BINARY, claimed_bytes=1 << 30),
        ACT + b"Content-Length: 1000\r\n\r\n{",
        b"\x00" * 100,
    ):
        with _upgraded(server) if sent[0] & 0x80 else _connected(server) as raw:
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            _read_to_end(raw)
    assert server.stop() == 0
    log = server.log()
    assert "Traceback" not in log
    assert "ERROR" not in log


# Another process, so that nothing of it is left to close its connection properly.
_VICTIM = f"""
import sys, time
sys.path.insert(0, {os.fspath(Path(__file__).parents[2])!r})
from tests.service.robot import TINY, SLOWLY, Robot

class Server:
    websocket_url = sys.argv[1]

Robot(Server).begin(TINY, options={SLOWLY!r})
print("the server works on it", flush=True)
time.sleep({PATIENCE_S})
"""


@contextlib.contextmanager
def _connected(server: RunningServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
        yield raw


@contextlib.contextmanager
def _upgraded(server: RunningServer) -> Iterator[socket.socket]:
    """Speak websocket, and wait for the server's greeting: what is sent before it may be dropped."""
    with _connected(server) as raw:
        raw.sendall(UPGRADE)
        assert _read_to_end(raw, until=b"fx\xa2fy").startswith(b"HTTP/1.1 101 ")
        yield raw


def _read_to_end(raw: socket.socket, until: bytes = b"\x00never\x00") -> bytes:
    """Return everything up to `until`, or until the server hangs up."""
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while not data.endswith(until) and (part := raw.recv(1 << 16)):
            data += part
    return bytes(data)


def _die(raw: socket.socket) -> None:
    """Leave without the goodbye that the system says for those who just leave."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def _close_code(answer: bytes) -> int:
    """Return the code of the close frame that ends what a server sent on a websocket."""
    frames, opcode = answer, None
    while frames:
        opcode, length, start = frames[0] & 15, frames[1], 2
        if length == 126:
            length, start = int.from_bytes(frames[2:4]), 4
        payload, frames = frames[start : start + length], frames[start + length :]
    assert opcode == 8, "the last frame is no close frame"
    return int.from_bytes(payload[:2])


def _refusal(answer: bytes) -> Refusal:
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    return refusal_of(httpx.Response(status, headers={"content-type": "application/json"}, content=body))


def _resident_kib(server: RunningServer) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])
