"""A chunk through the gateway and Triton, beside the embedded engine, and beside Triton asked directly.

Four ways to the same policy, over real sockets of one machine: the gateway on a Triton server, which asks it over gRPC
once for each chunk; the gateway with its embedded engine; tritonclient on that Triton server with no gateway between,
which neither keeps sessions nor holds actions to their limits; and tritonclient on a Triton server where every graph is
a model of its own, as it must be on a GPU. All run the same graphs in ONNX Runtime with one thread. The gateways are
asked over openpi's websocket protocol.

Every robot has a connection of its own, random observations that were packed beforehand, and sends the next one as soon
as the last is answered. The four take turns in short rounds, in random order. Client, gateway, Triton and its Python
backends share the cores of one machine, so what a way costs the processor shows in all figures.

What the gateway adds is the difference between the medians of the first and the third way, with an interval from a
bootstrap over the rounds.
"""

import asyncio
import os
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import np_to_triton_dtype
from websockets.asyncio.client import connect

from benchmarks.machine import describe_machine
from benchmarks.processes import HOST, free_port, ours, serving
from benchmarks.result import Bar, Result, Series, ms
from benchmarks.settings import ROOT, Settings
from policy_client.codec import pack
from policy_server import kserve
from policy_server.bundle import Bundle, load_bundle
from policy_server.export.triton_config import layout_of
from policy_server.export.triton_repo import export_policy
from policy_server.golden import draw_observation

ROUNDS, ROUND_S, WARM_UP = 12, 1.0, 20
CLIENTS = (1, 4, 16)
POLICIES = ("point-maze", "meta-world")
ON_TRITON, EMBEDDED = "gateway on Triton", "gateway, embedded"
DIRECT, APART = "tritonclient, no gateway", "tritonclient, graphs apart"
ROLES = {ON_TRITON: "ours", EMBEDDED: "ours", DIRECT: "peer", APART: "reference"}
WANTED_MS = 1.0
VARIABLE = "TRITON_PYTHON"

Ask = Callable[[int], Awaitable[None]]  # sends the observation of that number, and waits for its chunk
Connect = Callable[[], AbstractAsyncContextManager[Ask]]
Key = tuple[str, str, int]  # policy, way, clients


def run(settings: Settings, command: str) -> Result:
    """Measure the ways in turns."""
    python = os.environ.get(VARIABLE)
    if not python:
        raise FileNotFoundError(f"{VARIABLE} must name the Python of an environment with Triton; make bench sets it")
    machine = describe_machine()
    bundles = [load_bundle(ROOT / "models" / "zoo" / name) for name in POLICIES]
    rounds: dict[Key, list[list[float]]] = {}
    count = settings.rounds(ROUNDS)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        triton, apart = (stack.enter_context(_triton(python, bundles, Path(folder), a)) for a in (False, True))
        front = [*ours(bundles[0].path), *(str(bundle.path) for bundle in bundles[1:])]
        on_triton = stack.enter_context(serving([*front, "--engine", "triton", "--triton-url", triton]))
        # Loads what the other server has, too; nobody asks this gateway.
        stack.enter_context(serving([*front, "--engine", "triton", "--triton-url", apart]))
        embedded = stack.enter_context(serving([*front, "--engine", "onnx", "--threads", "1"]))
        ways = {
            (bundle.name, way): connection
            for bundle in bundles
            for way, connection in {
                ON_TRITON: _robots(f"{on_triton.url}/v1/policies/{bundle.name}/openpi", bundle),
                EMBEDDED: _robots(f"{embedded.url}/v1/policies/{bundle.name}/openpi", bundle),
                DIRECT: _clients(triton, bundle),
                APART: _clients(apart, bundle),
            }.items()
        }
        _measure(ways, count, rounds)

    order = sorted(rounds, key=lambda key: (POLICIES.index(key[0]), key[2], list(ROLES).index(key[1])))
    return Result(
        name="triton",
        machine=machine,
        command=command,
        columns=("", "policy", "clients", "p50 ms", "p99 ms", "chunks/s", "adds to p50, ms"),
        rows=tuple(_row(key, rounds) for key in order),
        series=tuple(Series.of(_panel(*key), key[1], ROLES[key[1]], np.concatenate(rounds[key])) for key in order),
        bars=tuple(
            Bar(
                f"the gateway adds less than {WANTED_MS:g} ms to tritonclient's p50 ({name}, 1 client)",
                str(added),
                added.value < WANTED_MS,
            )
            for name in POLICIES
            if (added := _added(rounds, name, 1))
        ),
        facts={"rounds": f"{count} of {ROUND_S:g} s for each way, policy and number of clients"},
    )


def _measure(ways: dict[tuple[str, str], Connect], count: int, rounds: dict[Key, list[list[float]]]) -> None:
    draw = np.random.default_rng(0)
    every = [(policy, way, clients) for policy, way in ways for clients in CLIENTS]
    for _ in tqdm(range(count), desc="triton", unit="round"):
        for i in draw.permutation(len(every)):
            policy, way, clients = every[i]
            latencies_ms = asyncio.run(_round(ways[policy, way], clients))
            rounds.setdefault(every[i], []).append(latencies_ms)


async def _round(connection: Connect, clients: int) -> list[float]:
    """Return the latencies of one round, in ms."""
    everybody_warm = asyncio.Barrier(clients)
    latencies_ms: list[float] = []

    async def robot(number: int) -> None:
        async with connection() as ask:
            for i in range(WARM_UP):
                await ask(number + i)
            await everybody_warm.wait()
            until_s = time.perf_counter() + ROUND_S
            i = number
            while (sent_at_s := time.perf_counter()) < until_s:
                i += 1
                await ask(i)
                latencies_ms.append(1e3 * (time.perf_counter() - sent_at_s))

    async with asyncio.timeout(60 + ROUND_S), asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(robot(number))
    return latencies_ms


def _observations(bundle: Bundle) -> Iterator[dict[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    for _ in range(8):
        yield kserve.pack_request(draw_observation(bundle.spec, draw), {})


def _robots(url: str, bundle: Bundle) -> Connect:
    """Return robots that speak openpi's protocol."""
    payloads = []
    for seed, tensors in enumerate(_observations(bundle)):
        payloads.append(pack({**kserve.unpack_request(tensors, 0), "options": {"seed": seed}}))

    @asynccontextmanager
    async def robot() -> AsyncIterator[Ask]:
        async with connect(url, compression=None, max_size=None) as connection:
            await connection.recv()

            async def ask(number: int) -> None:
                await connection.send(payloads[number % len(payloads)])
                reply = await connection.recv()
                if not isinstance(reply, bytes):
                    raise RuntimeError(f"a server refused an observation: {reply}")

            yield ask

    return robot


def _clients(url: str, bundle: Bundle) -> Connect:
    """Return clients that ask Triton for the policy's own model."""
    requests = []
    for tensors in _observations(bundle):
        inputs = []
        for name, array in tensors.items():
            tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        requests.append(inputs)

    @asynccontextmanager
    async def client() -> AsyncIterator[Ask]:
        async with InferenceServerClient(url) as connection:

            async def ask(number: int) -> None:
                seed = number % len(requests)
                reply = await connection.infer(bundle.name, requests[seed], parameters={"seed": seed})
                assert reply.as_numpy(kserve.ACTIONS) is not None

            yield ask

    return client


@contextmanager
def _triton(python: str, bundles: Sequence[Bundle], folder: Path, apart: bool) -> Iterator[str]:
    """Run Triton for as long as the context lasts; yields its gRPC address."""
    repository = folder / ("apart" if apart else "inside")
    for bundle in bundles:
        layout = layout_of(bundle, "onnx", plans=None, apart=apart, max_batch=16, instances=1, threads=1)
        export_policy(bundle, repository, layout)
    ports = [str(free_port()) for _ in range(3)]
    words = ["--grpc-port", ports[0], "--http-port", ports[1], "--metrics-port", ports[2]]
    process = subprocess.Popen(
        [python, "-m", "policy_server.triton", str(repository), *words, "--log-info=false", "--log-warning=false"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"{HOST}:{ports[0]}"
    finally:
        process.terminate()
        process.wait(60)


@dataclass(frozen=True)
class Difference:
    """A difference of two medians with its 95 % bootstrap interval, in ms."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] ms"


def _added(rounds: dict[Key, list[list[float]]], policy: str, clients: int) -> Difference:
    """Return what the gateway on Triton adds to the median of tritonclient; whole rounds are drawn, for both alike."""
    mine, theirs = rounds[policy, ON_TRITON, clients], rounds[policy, DIRECT, clients]

    def difference(places: Sequence[int] | np.ndarray) -> float:
        medians = [np.median(np.concatenate([side[i] for i in places])) for side in (mine, theirs)]
        return float(medians[0] - medians[1])

    draw = np.random.default_rng(0)
    drawn = [difference(draw.choice(len(mine), len(mine))) for _ in range(500)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Difference(difference(range(len(mine))), float(low), float(high))


def _row(key: Key, rounds: dict[Key, list[list[float]]]) -> tuple[str, ...]:
    policy, way, clients = key
    latencies_ms = np.concatenate(rounds[key])
    p50, p99 = np.percentile(latencies_ms, (50, 99))
    added = str(_added(rounds, policy, clients)).removesuffix(" ms") if way == ON_TRITON else ""
    rate = f"{len(latencies_ms) / (len(rounds[key]) * ROUND_S):.0f}"
    name = f"**{way}**" if ROLES[way] == "ours" else way
    return (name, policy, str(clients), ms(p50), ms(p99), rate, added)


def _panel(policy: str, way: str, clients: int) -> str:
    return f"{policy}, {clients} client" + ("s" if clients > 1 else "")
