"""Whether `policy-bench` tells the truth: p99 and p99.9 of a server whose stalls are known.

The server answers within two milliseconds, but every ten seconds it stalls for a second, by the clock. Of all
moments at which a robot may need an answer, one in a hundred lies within the first tenth of a second of a stall, so the
true p99 is 0.9 s and the service's time, and the true p99.9 is 0.99 s and the service's time, by arithmetic. Robots
send through `policy-bench`, open loop, over real sockets.

Beside it a client asks the same server in a closed loop, as wrk does: the next question waits for the answer to the
last. While the server stalls it asks nothing, so that each stall shows in one latency, and hardly any quantile sees it.
"""

import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from benchmarks.machine import describe_machine
from benchmarks.processes import Server, serving
from benchmarks.result import Bar, Result, Series, ms
from benchmarks.settings import Settings
from benchmarks.stalling_server import EVERY_S, SERVICE_S, STALL_S
from policy_client import PolicyClient
from policy_client.bench.arrivals import Periodic
from policy_client.bench.distribution import counts, decode
from policy_client.bench.doors import Target
from policy_client.bench.load import Load, run_load
from policy_client.bench.served import ServedPolicy

ROBOTS, RATE_HZ = 20, 20.0
PERIODS = 6  # of the stalls, in each way of asking
TOLERANCE = 0.02
OPEN, CLOSED, TRUTH = "policy-bench, open loop", "closed loop, as wrk asks", "truth"
STEP_S = 0.05
SPEC = {"horizon": 4, "step_s": STEP_S, "state": {"names": [str(i) for i in range(8)]}}


def true_quantile_ms(percent: float) -> float:
    """Return what `percent` of all latencies stay below: the others fall so soon after a stall began."""
    return 1e3 * (SERVICE_S + max(0.0, STALL_S - (1 - percent / 100) * EVERY_S))


def run(settings: Settings, command: str) -> Result:
    """Ask in both ways."""
    machine = describe_machine()
    seconds = EVERY_S * max(1, settings.rounds(PERIODS))
    with serving(["-m", "benchmarks.stalling_server"]) as server:
        series = (
            Series.of("latency", OPEN, "ours", _ask_open(server, seconds)),
            Series.of("latency", CLOSED, "reference", _ask_closed(server, seconds)),
        )
    truths = {percent: true_quantile_ms(percent) for percent in (50.0, 99.0, 99.9)}
    rows = [(one.label, str(one.count), *(ms(one.p(percent)) for percent in truths)) for one in series]
    bars = [
        Bar(
            f"p{percent:g} of stalls within {TOLERANCE:.0%} of the truth",
            f"{ms(series[0].p(percent))} ms for {ms(truth)} ms ({series[0].p(percent) / truth - 1:+.2%})",
            abs(series[0].p(percent) / truth - 1) <= TOLERANCE,
        )
        for percent, truth in truths.items()
        if percent > 50
    ]
    return Result(
        name="honesty",
        machine=machine,
        command=command,
        columns=("", "latencies", "p50, ms", "p99, ms", "p99.9, ms"),
        rows=((TRUTH, "", *map(ms, truths.values())), *rows),
        series=series,
        bars=tuple(bars),
        facts={"load": f"{ROBOTS} robots at {RATE_HZ:g} Hz, and one client in a closed loop, {seconds:g} s each"},
    )


def _ask_open(server: Server, seconds: float) -> np.ndarray:
    load = Load(
        Target(server.url, None, STEP_S),
        "openpi",
        ServedPolicy("stalling", "", "", SPEC),
        ROBOTS,
        Periodic(RATE_HZ),
        "periodic",
        seconds,
        1e3 / RATE_HZ,
    )
    with tqdm(total=round(ROBOTS * RATE_HZ * seconds), desc="honesty, open loop", leave=False) as bar:
        result = run_load(load, lambda sent, settled: bar.update(settled - bar.n))
    values_ms, often = counts(decode(result.latency.histogram))
    return np.repeat(values_ms, often)


def _ask_closed(server: Server, seconds: float) -> Sequence[float]:
    latencies_ms: list[float] = []
    ends_at_s = time.monotonic() + seconds
    with PolicyClient(server.url, step_s=STEP_S) as client:
        observation = {"state": np.random.default_rng(0).normal(size=8).astype(np.float32)}
        while (asked_at_s := time.monotonic()) < ends_at_s:
            client.infer(observation)
            latencies_ms.append(1e3 * (time.monotonic() - asked_at_s))
    return latencies_ms
