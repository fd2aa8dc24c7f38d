"""How fast `/healthz` answers while inferences of half a second run back to back.

A probe that gets no answer is how an orchestrator decides to restart a server, so a policy that computes must not keep
a server from answering. One robot asks for chunk after chunk; meanwhile probes go out about every 20 ms, at random
moments and whether or not earlier ones were answered, each over a connection of its own, as an orchestrator's do. A
probe's latency is the time from before it connects until its answer was read to the end.

On this server a BESO network with random weights computes, on its default engine and with its default threads, for as
many denoising steps as fill half a second: the real thing, and nothing is kept free for the gateway. On openpi's server
the policy multiplies matrices for half a second; it runs on the event loop there, so a probe waits for one inference to
end, and often for more. Both are measured idle as well. Robot, probes and server share the cores of one machine.
"""

import asyncio
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.bundles import write_slow
from benchmarks.machine import describe_machine
from benchmarks.payload import JOINTS
from benchmarks.processes import HOST, Server, openpi_path, ours, serving
from benchmarks.result import Bar, Result, Series, ms
from benchmarks.settings import OPENPI_HINT, Settings
from policy_client.aio import AsyncPolicyClient
from policy_client.chunk import ActionChunk

PROBES, IDLE_PROBES = 1000, 300
GAP_S = 0.020
INFERENCE_MS, MAX_STEPS = 500.0, 200
WANTED_MS = 20.0
OURS, OPENPI = "this server", "openpi's server"
IDLE, BUSY = "idle", "while it infers"
_TIMEOUT_S = 10.0
_draw = np.random.default_rng(0)


def run(settings: Settings, command: str) -> Result:
    """Probe one server after the other."""
    machine = describe_machine()
    busy, idle = settings.rounds(PROBES), settings.rounds(IDLE_PROBES)
    series: list[Series] = []
    inferences_ms: dict[str, list[float]] = {}
    tqdm.write("health: exporting a network of random weights")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = stack.enter_context(serving(ours(write_slow(Path(folder) / "slow"))))
        steps, engine = asyncio.run(_calibrate(server))
        contenders: list[tuple[str, Server, int | None]] = [(OURS, server, steps)]
        if settings.openpi:
            arguments = ["-m", "benchmarks.peers.openpi_server", "--work-ms", f"{INFERENCE_MS}"]
            server = stack.enter_context(serving(arguments, python_path=openpi_path(settings.openpi)))
            contenders.append((OPENPI, server, None))
        else:
            tqdm.write(f"health: {OPENPI_HINT}")
        for name, server, chosen_steps in contenders:
            role = "ours" if name == OURS else "peer"
            series.append(Series.of(IDLE, name, role, asyncio.run(_probe(server, idle, f"health, {name}, idle"))))
            latencies_ms, inferences_ms[name] = asyncio.run(
                _probe_while_inferring(server, busy, chosen_steps, f"health, {name}, inferring")
            )
            series.append(Series.of(BUSY, name, role, latencies_ms))

    series.sort(key=lambda s: s.panel == BUSY)
    p99 = next(s.p(99) for s in series if (s.panel, s.label) == (BUSY, OURS))
    return Result(
        name="health",
        machine=machine,
        command=command,
        columns=("", "", "probes", "p50 ms", "p99 ms", "max ms", "inferences", "median inference ms"),
        rows=tuple(_row(s, inferences_ms[s.label] if s.panel == BUSY else []) for s in series),
        series=tuple(series),
        bars=(Bar(f"p99 of `/healthz` below {WANTED_MS:g} ms while inferences run", f"{ms(p99)} ms", p99 < WANTED_MS),),
        facts={"policy here": f"BESO, 19 million random weights, 64 actions, {steps} steps on {engine}"},
    )


async def _calibrate(server: Server) -> tuple[int, str]:
    """Return how many steps fill `INFERENCE_MS`, and the engine that takes them."""
    steps = 10
    async with AsyncPolicyClient(server.url, request_timeout_s=_TIMEOUT_S) as robot:
        for _ in range(3):
            chunks = [await robot.infer(_observation(), steps=steps) for _ in range(5)]
            took_ms = float(np.median([_infer_ms(chunk) for chunk in chunks]))
            steps = min(max(round(steps * INFERENCE_MS / took_ms), 1), MAX_STEPS)
    return steps, str(chunks[0].metadata["engine"])


async def _probe_while_inferring(
    server: Server, count: int, steps: int | None, title: str
) -> tuple[list[float], list[float]]:
    """Return the latencies of `count` probes, and of the inferences that ran meanwhile."""
    done = asyncio.Event()
    inferences_ms: list[float] = []

    async def keep_busy() -> None:
        async with AsyncPolicyClient(server.url, request_timeout_s=_TIMEOUT_S) as robot:
            while not done.is_set():
                inferences_ms.append(_infer_ms(await robot.infer(_observation(), steps=steps)))

    async with asyncio.TaskGroup() as group:
        group.create_task(keep_busy())
        await asyncio.sleep(INFERENCE_MS / 1e3)
        latencies_ms = await _probe(server, count, title)
        done.set()
    return latencies_ms, inferences_ms


async def _probe(server: Server, count: int, title: str) -> list[float]:
    """Return the latencies of `count` probes, in ms."""
    gaps_s = np.random.default_rng(0).uniform(0.5 * GAP_S, 1.5 * GAP_S, count)
    due_s = time.perf_counter() + np.cumsum(gaps_s)
    with tqdm(total=count, desc=title, unit="probe") as bar:

        async def probe(at_s: float) -> float:
            await asyncio.sleep(at_s - time.perf_counter())
            started_at_s = time.perf_counter()
            async with asyncio.timeout(_TIMEOUT_S):
                await _ask_health(server)
            bar.update()
            return 1e3 * (time.perf_counter() - started_at_s)

        return list(await asyncio.gather(*(probe(at_s) for at_s in due_s)))


async def _ask_health(server: Server) -> None:
    reader, writer = await asyncio.open_connection(HOST, server.port)
    try:
        writer.write(f"GET /healthz HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        if not answer.startswith(b"HTTP/1.1 200") or not answer.endswith(b"OK\n"):
            raise RuntimeError(f"/healthz answered {answer[:200]!r}")
    finally:
        writer.close()


def _observation() -> dict[str, np.ndarray]:
    return {"state": _draw.standard_normal(JOINTS, dtype=np.float32)}


def _infer_ms(chunk: ActionChunk) -> float:
    return float(chunk.metadata["policy_timing"]["infer_ms"])


def _row(series: Series, inferences_ms: list[float]) -> tuple[str, ...]:
    inferring = (str(len(inferences_ms)), f"{np.median(inferences_ms):.0f}") if inferences_ms else ("", "")
    name = f"**{series.label}**" if series.role == "ours" else series.label
    latencies = (ms(series.p(percent)) for percent in (50, 99, 100))
    return (name, series.panel, str(series.count), *latencies, *inferring)
