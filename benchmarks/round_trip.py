"""One round trip over the openpi websocket protocol, with a policy that costs nothing.

An observation of two 224x224 camera images and 14 joint angles goes out, a chunk of 16x14 actions comes back. Three
servers answer it: this one, with every check, the session and the queue; openpi's own `WebsocketPolicyServer`; and a
bare `websockets` server that reads nothing and sends ready-made bytes. First messages and replies have the same size
from all three. Each server has a process of its own and the same Python and libraries.

A policy without a network never asks the engine, so this server answers it on its event loop, as openpi's server
answers every policy. A policy with a network takes a turn on the inference thread here, and that turn, some tens of
microseconds on an idle machine, is not part of these figures; what it buys is the next section.

One client asks for all of them: asyncio `websockets` without compression, with random images that were packed
beforehand and replies that are not unpacked, because both cost the same whoever serves. Each of its connections sends
the next observation as soon as the last is answered. The servers take turns in short rounds, in random order; every
round opens its connections anew and does not count the first messages of each. Now and then all servers are started
afresh: how a process's memory happens to be laid out stays with it, and can cost it page faults on every message.

Client and server share the cores of one machine, and nothing is pinned. With many clients this measures a queue:
the latency is mostly waiting for the others, and the client's own work is a good part of it. uvloop reads every message
that has arrived before the first of them is answered, so some clients wait one turn and some two: the distribution has
two humps, and its median lies on either, though the mean does not jump. A network is not part of it.
The ratios are steadier than the times; their intervals are a bootstrap over the rounds.
"""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.bundles import write_hold
from benchmarks.machine import describe_machine
from benchmarks.payload import pack_observations
from benchmarks.processes import Server, openpi_path, ours, serving
from benchmarks.ratios import Ratio, ratio_of
from benchmarks.result import Bar, Result, Series, ms
from benchmarks.settings import OPENPI_HINT, Settings

LAUNCHES, ROUNDS, ROUND_S = 5, 3, 1.0
CLIENTS = (1, 4, 16, 32)
BAR_CLIENTS = (1, 16)
WARM_UP = 30  # messages of each connection that are not counted
OURS, OPENPI, ECHO = "this server", "openpi's server", "bare websockets echo"
ROLES = {OURS: "ours", OPENPI: "peer", ECHO: "reference"}

Rounds = dict[tuple[str, int], list[list[float]]]  # ms, by server and number of clients, then by round
CpuTimes = dict[tuple[str, int], float]  # s, of the server alone; rounds with what they do not count


def run(settings: Settings, command: str) -> Result:
    """Measure the servers in turns."""
    machine = describe_machine()
    payloads = pack_observations(8)
    rounds: Rounds = {}
    cpu_s: CpuTimes = {}
    launches = settings.rounds(LAUNCHES)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=launches * ROUNDS, desc="round_trip", unit="round") as bar:
        hold = write_hold(Path(folder) / "hold")
        for launch in range(launches):
            with ExitStack() as stack:
                servers = _start(stack, hold, settings.openpi, payloads[0])
                reply_bytes = {name: asyncio.run(_sizes(server, payloads[0]))[1] for name, server in servers.items()}
                draw = np.random.default_rng(launch)
                for _ in range(ROUNDS):
                    _measure(servers, payloads, draw, rounds, cpu_s)
                    bar.update()
    if OPENPI not in servers:
        tqdm.write(f"round_trip: {OPENPI_HINT}")

    series = tuple(
        Series.of(_panel(clients), name, ROLES[name], np.concatenate(rounds[name, clients]))
        for clients in CLIENTS
        for name in servers
    )
    return Result(
        name="round_trip",
        machine=machine,
        command=command,
        columns=(
            "",
            "clients",
            "mean ms",
            "p50 ms",
            "p99 ms",
            "messages/s",
            "server's CPU us/message",
            "p50, openpi = 1",
            "p99, openpi = 1",
        ),
        rows=tuple(_row(name, clients, rounds, cpu_s[name, clients]) for clients in CLIENTS for name in servers),
        series=series,
        bars=_bars(rounds) if OPENPI in servers else (),
        facts={
            "observation": f"{len(payloads[0]):,} bytes",
            "reply": ", ".join(f"{size:,} bytes from {name}" for name, size in reply_bytes.items()),
            "rounds": f"{launches} x {ROUNDS} of {ROUND_S:g} s for each server and number of clients",
        },
    )


def _start(stack: ExitStack, hold: Path, openpi: Path | None, payload: bytes) -> dict[str, Server]:
    """Start the servers, for as long as `stack` lasts."""
    servers = {OURS: stack.enter_context(serving(ours(hold)))}
    metadata_bytes, reply_bytes = asyncio.run(_sizes(servers[OURS], payload))
    same_size = ["--metadata-bytes", str(metadata_bytes)]
    if openpi:
        arguments = ["-m", "benchmarks.peers.openpi_server", *same_size]
        servers[OPENPI] = stack.enter_context(serving(arguments, python_path=openpi_path(openpi)))
    arguments = ["-m", "benchmarks.peers.echo_server", *same_size, "--reply-bytes", str(reply_bytes)]
    servers[ECHO] = stack.enter_context(serving(arguments))
    return servers


def _measure(
    servers: dict[str, Server], payloads: Sequence[bytes], draw: np.random.Generator, rounds: Rounds, cpu_s: CpuTimes
) -> None:
    """Add one round of each server and number of clients to `rounds` and `cpu_s`."""
    for clients in CLIENTS:
        for name in map(str, draw.permutation(list(servers))):
            before_s = servers[name].cpu_s()
            rounds.setdefault((name, clients), []).append(asyncio.run(_round(servers[name], clients, payloads)))
            cpu_s[name, clients] = cpu_s.get((name, clients), 0.0) + servers[name].cpu_s() - before_s


async def _round(server: Server, clients: int, payloads: Sequence[bytes]) -> list[float]:
    """Return the round trips of one round, in ms."""
    everybody_warm = asyncio.Barrier(clients)
    latencies_ms: list[float] = []

    async def ask(connection: ClientConnection, payload: bytes) -> None:
        await connection.send(payload)
        reply = await connection.recv()
        if not isinstance(reply, bytes):
            raise RuntimeError(f"a server refused an observation: {reply}")

    async def robot(number: int) -> None:
        async with connect(server.url, compression=None, max_size=None) as connection:
            await connection.recv()
            for i in range(WARM_UP):
                await ask(connection, payloads[(number + i) % len(payloads)])
            await everybody_warm.wait()
            until_s = time.perf_counter() + ROUND_S
            i = number
            while (sent_at_s := time.perf_counter()) < until_s:
                i += 1
                await ask(connection, payloads[i % len(payloads)])
                latencies_ms.append(1e3 * (time.perf_counter() - sent_at_s))

    async with asyncio.timeout(60 + ROUND_S), asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(robot(number))
    return latencies_ms


async def _sizes(server: Server, payload: bytes) -> tuple[int, int]:
    """Return the bytes of a server's first message and of its second reply, which holds one timing more."""
    async with asyncio.timeout(10), connect(server.url, compression=None, max_size=None) as connection:
        metadata = await connection.recv()
        for _ in range(2):
            await connection.send(payload)
            reply = await connection.recv()
    return len(metadata), len(reply)


def _row(name: str, clients: int, rounds: Rounds, cpu_s: float) -> tuple[str, ...]:
    mine, theirs = rounds[name, clients], rounds.get((OPENPI, clients))
    latencies_ms = np.concatenate(mine)
    p50, p99 = np.percentile(latencies_ms, (50, 99))
    counted = sum(map(len, mine))
    cpu_us = 1e6 * cpu_s / (counted + len(mine) * clients * WARM_UP)
    beside = [str(ratio_of(mine, theirs, percent)) if theirs else "" for percent in (50, 99)]
    figures = (ms(latencies_ms.mean()), ms(p50), ms(p99), f"{counted / (len(mine) * ROUND_S):.0f}", f"{cpu_us:.0f}")
    return (f"**{name}**" if name == OURS else name, str(clients), *figures, *beside)


def _bars(rounds: Rounds) -> tuple[Bar, ...]:
    return tuple(
        Bar(
            f"p{percent} no worse than openpi's, {_panel(clients)}",
            f"{ratio} of openpi's",
            _no_worse(ratio),
        )
        for clients in BAR_CLIENTS
        for percent in (50, 99)
        if (ratio := ratio_of(rounds[OURS, clients], rounds[OPENPI, clients], percent))
    )


def _no_worse(ratio: Ratio) -> bool:
    return ratio.value <= 1


def _panel(clients: int) -> str:
    return f"{clients} client" + ("s" if clients > 1 else "")
