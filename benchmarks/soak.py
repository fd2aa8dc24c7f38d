"""A long drive over a bad network: does the server keep its memory, its answers and its robots?

Robots stream observations through proxies that delay, lose, double, reorder and cut, each through one with faults of
its own. Together they ask for a share of what the server sustains without faults. Meanwhile the server's memory is
looked at every few seconds; afterwards a random sample of the chunks is computed again in process, from observation
and seed, and the server must still answer as it did before.
"""

import argparse
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.contenders import ONE_THREAD, make_contender
from benchmarks.fault_proxy import FaultProxy, ProxyCounts
from benchmarks.faults import Faults
from benchmarks.machine import describe_machine
from benchmarks.memory import MemoryWatch, Sample, growth
from benchmarks.processes import Server, ours, serving
from benchmarks.questions import Examiner, Judge
from benchmarks.result import Bar, Result, ms, table_lines
from benchmarks.robot_load import Load, run_round
from benchmarks.settings import ROOT
from benchmarks.soak_robot import Log, OpenStream, SoakRobot, Stream, Verdict, verdict
from policy_client import PolicyStream
from policy_models.spec import Observation
from policy_server.bundle import Bundle, load_bundle
from policy_server.golden import draw_observation

ENGINE = "onnx"
OBSERVATIONS, QUESTIONS = 64, 16
EPISODE, TAKE = 200, 0.02
LOOK_S, WARM_UP_SHARE, LONGEST_WARM_UP_S = 2.0, 0.1, 120.0
GROWTH, ANSWERED = 1.05, 0.5
DEADLINE_S = 1.0
LONGEST_MINUTES = 24 * 60
NETWORKS = {
    "clean": Faults(),
    "mild": Faults(delay_ms=(0, 10), drop=0.002, duplicate=0.002, reorder=0.002, cut_every_s=120.0),
    "rough": Faults(delay_ms=(0, 25), drop=0.01, duplicate=0.01, reorder=0.01, cut_every_s=30, hang=0.2, hang_s=5.0),
}
_PATIENCE_S = 30.0

Connect = Callable[[str, int, float], AbstractContextManager[Stream]]  # by address, which robot, and its rate in Hz


@dataclass(frozen=True)
class Plan:
    """What is driven, and how.

    Attributes:
        bundle: The policy.
        minutes: How long.
        robots: How many.
        load: Share of what they get without pause that they ask for together.
        network: One of `NETWORKS`.
        seed: Of all luck.
    """

    bundle: Bundle
    minutes: float
    robots: int
    load: float
    network: str
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= LONGEST_MINUTES:
            raise ValueError(f"minutes is {self.minutes}, expected more than 0 and at most {LONGEST_MINUTES}")
        if self.robots < 1 or self.load <= 0:
            raise ValueError(f"{self.robots} robots at a load of {self.load} ask nothing")


def main(words: Sequence[str] | None = None) -> int:
    """Drive as long as was asked for; returns the exit status, 1 if anything was amiss."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: %(default)s)")
    parser.add_argument("--robots", type=int, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--load", type=float, default=0.8, help="share of what is sustained (default: %(default)s)")
    parser.add_argument("--network", choices=NETWORKS, default="rough", help="how bad it is (default: %(default)s)")
    parser.add_argument("--bundle", type=Path, default=ROOT / "models" / "zoo" / "point-maze", help="the policy")
    parser.add_argument("--seed", type=int, default=0, help="of all luck (default: %(default)s)")
    words = sys.argv[1:] if words is None else words
    told = parser.parse_args(words)
    try:
        plan = Plan(load_bundle(told.bundle), told.minutes, told.robots, told.load, told.network, told.seed)
    except ValueError as error:
        parser.error(str(error))
    result = soak(plan, connect_stream, shlex.join(["python", "-m", "benchmarks.soak", *words]))
    tqdm.write("\n".join(table_lines(result)))
    return 0 if all(bar.met for bar in result.bars) else 1


def connect_stream(url: str, number: int, rate_hz: float) -> PolicyStream:
    """Return the stream of one robot, to be entered."""
    return PolicyStream(url, name=f"soak-{number}", rate_hz=rate_hz, deadline_s=DEADLINE_S, continuity="replace")


def soak(plan: Plan, connect: Connect, command: str) -> Result:
    """Serve the policy, drive the robots, and judge what they lived through."""
    machine = describe_machine()
    draw = np.random.default_rng(plan.seed)
    contender = make_contender(plan.bundle, ENGINE + ONE_THREAD)
    judge, examiner = Judge(plan.bundle, contender), Examiner(plan.bundle, contender, QUESTIONS)
    observations = [draw_observation(plan.bundle.spec, draw) for _ in range(OBSERVATIONS)]
    with serving([*ours(plan.bundle.path), "--engine", ENGINE, "--threads", "1"]) as server:
        before_hz = _sustained_hz(server, examiner, plan.robots)
        rate_hz = plan.load * before_hz / plan.robots
        with MemoryWatch(server.process_id, every_s=LOOK_S) as watch:
            logs, counts = _drive(plan, server, observations, connect, rate_hz)
        after_hz = _sustained_hz(server, examiner, plan.robots)
    found = verdict(judge, observations, [one for log in logs for one in log.taken])
    return Result(
        name="soak",
        machine=machine,
        command=command,
        columns=("robot", "sent", "answered", "p50 ms", "p99 ms", "longest silence s", "connections", "failures"),
        rows=tuple(_row(i, *both) for i, both in enumerate(zip(logs, counts, strict=True))),
        series=(),
        bars=tuple(_bars(plan, logs, found, watch.samples)),
        facts={
            "rate": f"{rate_hz:.3g} observations/s from each of {plan.robots} robots",
            "network": f"{plan.network}, {NETWORKS[plan.network]}",
            "befell": _befell(counts),
            "without pause": f"{before_hz:.0f} chunks/s before, {after_hz:.0f} after",
            "computed again": f"{found.same} bitwise the same, {found.close} within the tolerance, {found.wrong} wrong",
            "open files": " to ".join(str(f(sample.files for sample in watch.samples)) for f in (min, max)),
        },
    )


def _sustained_hz(server: Server, examiner: Examiner, robots: int, seconds: float = 2.0) -> float:
    """Return how many chunks a second robots get without pause; raises ValueError if they are wrong."""
    result = run_round(server.url, examiner.questions, Load(robots, seconds))
    examiner.check(result.sample)
    return result.answered / seconds


def _drive(
    plan: Plan, server: Server, observations: Sequence[Observation], connect: Connect, rate_hz: float
) -> tuple[list[Log], list[ProxyCounts]]:
    ended = threading.Event()
    robots: list[SoakRobot] = []
    counts: list[ProxyCounts] = []
    threads: list[threading.Thread] = []
    mistakes: list[Exception] = []

    def run(robot: SoakRobot, open_stream: OpenStream) -> None:
        try:
            robot.run(open_stream, ended)
        except Exception as error:  # not of the network's making, so there is no point in going on
            mistakes.append(error)
            ended.set()

    with ExitStack() as stack:
        for number in range(plan.robots):
            faults = replace(NETWORKS[plan.network], seed=plan.seed * plan.robots + number)
            proxy = stack.enter_context(FaultProxy(server.port, up=faults, down=faults))
            counts.append(proxy.counts)
            robot = SoakRobot(observations, rate_hz=rate_hz, episode_length=EPISODE, take=TAKE, seed=number)
            robots.append(robot)
            url = f"{proxy.url}/v1/policies/{plan.bundle.name}/stream"
            open_stream = partial(connect, url, number, rate_hz)
            threads.append(threading.Thread(target=run, args=(robot, open_stream), daemon=True))
        for thread in threads:
            thread.start()
        try:
            for _ in tqdm(range(round(60 * plan.minutes)), desc="soak", unit="s"):
                if ended.wait(1.0):
                    break
        finally:
            ended.set()
            for thread in threads:
                thread.join(_PATIENCE_S)
    if mistakes:
        raise mistakes[0]
    return [robot.log for robot in robots], counts


def _row(number: int, log: Log, counts: ProxyCounts) -> tuple[str, ...]:
    p50, p99 = np.percentile(log.latencies_ms, (50, 99)) if log.latencies_ms else (np.nan, np.nan)
    failures = ", ".join(f"{count} {name}" for name, count in log.failures.items())
    silence = f"{log.longest_silence_s:.1f}"
    return (str(number), str(log.sent), str(log.answered), ms(p50), ms(p99), silence, str(counts.connections), failures)


def _bars(plan: Plan, logs: Sequence[Log], found: Verdict, samples: Sequence[Sample]) -> Iterator[Bar]:
    yield Bar(
        "chunks that were computed again are right",
        f"{found.wrong} of {found.count} wrong",
        0 == found.wrong < found.count,
    )
    astray = sum(log.strangers + log.backward for log in logs)
    yield Bar("chunks answer what was sent in their episode, the newest last", f"{astray} did not", astray == 0)
    least = min(log.answered / max(1, log.sent) for log in logs)
    yield Bar(
        f"every robot gets a chunk for {ANSWERED:.0%} of its observations", f"{least:.1%} at least", least >= ANSWERED
    )
    claim = f"the last third holds at most {GROWTH:g} times the memory after the warm-up"
    try:
        grown = growth(samples, warm_up_s=min(LONGEST_WARM_UP_S, WARM_UP_SHARE * 60 * plan.minutes))
    except ValueError as error:
        yield Bar(claim, str(error), False)
    else:
        held = max(sample.resident_bytes for sample in samples) / 2**20
        yield Bar(claim, f"{grown:.3f} times, {held:.0f} MiB at most", grown <= GROWTH)


def _befell(counts: Sequence[ProxyCounts]) -> str:
    ways = list(chain.from_iterable((one.up, one.down) for one in counts))
    names = ("received", "dropped", "duplicated", "reordered", "aborted", "torn", "hung")
    return ", ".join(f"{sum(getattr(way, name) for way in ways):,} {name}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
