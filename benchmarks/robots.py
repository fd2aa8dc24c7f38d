"""Many robots, one policy: chunks a second, latencies at a rate, and what a flood does to the others.

This server and openpi's own, unmodified `WebsocketPolicyServer`, whose policy runs the very same program on the very
same engine in its process: ONNX Runtime with one thread for both. Robots speak openpi's protocol and send the same
random observations, packed beforehand, each with its seed. Both servers' answers are held to those of the engine alone,
seed by seed: the first, and one of every twenty after it. openpi's server gets a policy that checks no observation and
no action; this one checks all of them.

Robots ask in two ways. Without pause: each sends its next observation as soon as the last is answered. At a rate: each
sends on a schedule of its own, answered or not, such that all together ask for 80 % of what openpi's server sustained
without pause a few seconds before; a latency counts from the time on the schedule, so none hides that a question
waited. A chunk that comes later than the deadline has missed it. Then they ask for 40 %, and once more while another
robot, with an API key of its own, asks without pause over several connections: more than half of the server would be
more than is theirs. Latencies are those of the eight. openpi's server knows no keys.

The servers take turns in short rounds, in random order, and now and then are started afresh. The robots are one process
with uvloop that writes ready-made frames. It shares two or more cores with the server, and so has a part in all
figures; ratios are steadier, and their intervals are a bootstrap over the rounds.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from benchmarks.contenders import ONE_THREAD, make_contender
from benchmarks.machine import describe_machine
from benchmarks.processes import openpi_path, ours, serving
from benchmarks.questions import Examiner
from benchmarks.ratios import Ratio, ratio_of
from benchmarks.result import Bar, Result, Series, ms
from benchmarks.robot_load import FLOOD_KEY, ROBOT_KEY, Load, Round, run_round
from benchmarks.settings import OPENPI_HINT, ROOT, Settings
from policy_server.bundle import Bundle, load_bundle

POLICIES = ("point-maze", "meta-world")
ENGINE = "onnx"
LAUNCHES, ROUNDS = 5, 2
ROBOTS, ROUND_S = (1, 2, 4, 8, 16, 32), 1.0
AT_RATE, RATE_S = 8, 2.0
SHARE, CALM_SHARE = 0.8, 0.4  # of what openpi's server sustains
FLOODERS = 4
DEADLINE_MS = 50.0
WANTED, FLOOD_WANTED = 1.8, 1.25
QUESTIONS = 32
OURS, OPENPI = "this server", "openpi's server"
ROLES = {OURS: "ours", OPENPI: "peer"}


@dataclass(frozen=True)
class Key:
    """What was asked of whom."""

    policy: str
    share: float  # that all together ask for, 0 without pause
    flooded: bool
    robots: int
    server: str

    @property
    def label(self) -> str:
        """The condition, in words."""
        way = f"at {self.share:.0%}" if self.share else "without pause"
        flood = ", one more floods" if self.flooded else ""
        return f"{self.policy}, {self.robots} robot{'s' if self.robots > 1 else ''} {way}{flood}"

    def of(self, server: str) -> "Key":
        """Return the same for another server."""
        return replace(self, server=server)


Rounds = dict[Key, list[Round]]


def run(settings: Settings, command: str) -> Result:
    """Measure the servers in turns, policy by policy."""
    machine = describe_machine()
    if not settings.openpi:
        tqdm.write(f"robots: {OPENPI_HINT}")
    rounds: Rounds = {}
    launches, checked = settings.rounds(LAUNCHES), 0
    with tqdm(total=len(POLICIES) * launches * ROUNDS, desc="robots", unit="round") as bar:
        for policy in POLICIES:
            bundle = load_bundle(ROOT / "models" / "zoo" / policy)
            examiner = Examiner(bundle, make_contender(bundle, ENGINE + ONE_THREAD), QUESTIONS)
            for launch in range(launches):
                with ExitStack() as stack:
                    urls = _start(stack, bundle, settings)
                    draw = np.random.default_rng(launch)
                    for _ in range(ROUNDS):
                        checked += _measure(urls, examiner, policy, draw, rounds)
                        bar.update()

    return Result(
        name="robots",
        machine=machine,
        command=command,
        columns=(
            "",
            "policy, robots, load",
            "chunks/s",
            "p50 ms",
            "p99 ms",
            f"later than {DEADLINE_MS:g} ms",
            "chunks/s, openpi = 1",
            "p99, openpi = 1",
            "p99, without the flood = 1",
            "flooder's chunks/s",
        ),
        rows=tuple(_row(key, rounds) for key in _ordered(rounds)),
        series=tuple(
            Series.of(key.label, key.server, ROLES[key.server], np.concatenate(_latencies(rounds[key])))
            for key in _ordered(rounds)
            if key.share or key.robots in (1, AT_RATE)
        ),
        bars=tuple(_bars(rounds)),
        facts={
            "rounds": f"{launches} x {ROUNDS} for each server and load, of {ROUND_S:g} s, and {RATE_S:g} s at a rate",
            "rate": "; ".join(_rates(rounds)),
            "flood": f"{FLOODERS} connections with one key",
            "checked": f"{checked:,} replies against the engine alone",
        },
    )


def _start(stack: ExitStack, bundle: Bundle, settings: Settings) -> Mapping[str, str]:
    """Start the servers for as long as `stack` lasts; returns their addresses."""
    words = ["--engine", ENGINE, "--threads", "1", "--api-keys", f"{ROBOT_KEY},{FLOOD_KEY}"]
    urls = {OURS: stack.enter_context(serving([*ours(bundle.path), *words])).url}
    if settings.openpi:
        peer = ["-m", "benchmarks.peers.openpi_policy", str(bundle.path), "--contender", ENGINE + ONE_THREAD]
        urls[OPENPI] = stack.enter_context(serving(peer, python_path=openpi_path(settings.openpi))).url
    return urls


def _measure(
    urls: Mapping[str, str], examiner: Examiner, policy: str, draw: np.random.Generator, rounds: Rounds
) -> int:
    """Add a round of each load and server to `rounds`; returns how many replies were checked."""
    checked = 0

    def measure(share: float, load: Load) -> None:
        nonlocal checked
        seed = int(draw.integers(2**32))  # the same schedule for both
        for server in map(str, draw.permutation(list(urls))):
            result = run_round(urls[server], examiner.questions, load, seed)
            checked += examiner.check(result.sample)
            rounds.setdefault(Key(policy, share, load.flooders > 0, load.robots, server), []).append(result)

    for robots in ROBOTS:
        measure(0.0, Load(robots, ROUND_S))
    yardstick = OPENPI if OPENPI in urls else OURS
    sustained_hz = rounds[Key(policy, 0.0, False, AT_RATE, yardstick)][-1].answered / ROUND_S
    for share, flooders in ((SHARE, 0), (CALM_SHARE, 0), (CALM_SHARE, FLOODERS)):
        measure(share, Load(AT_RATE, RATE_S, share * sustained_hz / AT_RATE, flooders))
    return checked


def _ordered(rounds: Rounds) -> list[Key]:
    return sorted(
        rounds,
        key=lambda key: (
            POLICIES.index(key.policy),
            key.share > 0,
            -key.share,
            key.flooded,
            key.robots,
            key.server == OPENPI,
        ),
    )


def _rates(rounds: Rounds) -> Iterator[str]:
    for policy in POLICIES:
        asked_hz = [len(one.latencies_ms) / RATE_S for one in rounds[Key(policy, SHARE, False, AT_RATE, OURS)]]
        low, high = np.percentile(asked_hz, (0, 100))
        yield f"{low:.0f} to {high:.0f} chunks/s are {SHARE:.0%}, by round ({policy})"


def _row(key: Key, rounds: Rounds) -> tuple[str, ...]:
    mine = rounds[key]
    latencies_ms = np.concatenate(_latencies(mine))
    p50, p99 = np.percentile(latencies_ms, (50, 99))
    seconds = len(mine) * (RATE_S if key.share else ROUND_S)
    theirs = rounds.get(key.of(OPENPI)) if key.server == OURS else None
    return (
        f"**{key.server}**" if key.server == OURS else key.server,
        key.label,
        f"{sum(one.answered for one in mine) / seconds:.0f}",
        ms(p50),
        ms(p99),
        f"{np.mean(latencies_ms > DEADLINE_MS):.2%}",
        str(_speed(mine, theirs)) if theirs else "",
        str(ratio_of(_latencies(mine), _latencies(theirs), 99)) if theirs else "",
        str(_disturbance(key, rounds)) if key.flooded else "",
        f"{sum(one.flooded for one in mine) / seconds:.0f}" if key.flooded else "",
    )


def _bars(rounds: Rounds) -> Iterator[Bar]:
    for policy in POLICIES:
        closed, flooded = Key(policy, 0.0, False, AT_RATE, OURS), Key(policy, CALM_SHARE, True, AT_RATE, OURS)
        if theirs := rounds.get(closed.of(OPENPI)):
            ratio = _speed(rounds[closed], theirs)
            claim = f"{AT_RATE} robots get at least {WANTED} times the chunks a second that openpi's server gives them"
            yield Bar(f"{claim} ({policy})", f"{ratio} times", ratio.value >= WANTED)
        ratio = _disturbance(flooded, rounds)
        claim = f"p99 of {AT_RATE} robots at a rate at most {FLOOD_WANTED} times as long while one more floods"
        yield Bar(f"{claim} ({policy})", f"{ratio} times", ratio.value <= FLOOD_WANTED)


def _speed(mine: Sequence[Round], theirs: Sequence[Round]) -> Ratio:
    """Return the ratio of the chunks that came in a round."""
    return ratio_of([[one.answered] for one in mine], [[one.answered] for one in theirs])


def _disturbance(flooded: Key, rounds: Rounds) -> Ratio:
    calm = replace(flooded, flooded=False)
    return ratio_of(_latencies(rounds[flooded]), _latencies(rounds[calm]), 99)


def _latencies(rounds: Sequence[Round]) -> list[list[float]]:
    return [one.latencies_ms for one in rounds]
