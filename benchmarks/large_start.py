"""Starting a server with a MoDE policy of released size: until it answers, and what it then holds.

A fresh `policy-server serve` each time, from the start of Python until its port opens: digests of 4.1 GB of files, the
graphs, the golden case, warm-up. The files were read before and lie in the system's page cache, as after an upgrade or
a restart; after a reboot the disk's speed comes on top.

Memory is that of the server's process as Linux counts it once the policy is ready, in multiples of the bundle's float32
graphs and weights: resident memory is what the bar is held to. Its peak is higher, since OpenVINO maps the file of
weights and packs what it maps: while it does, both are resident. The mapped pages can be dropped at any time, being
the file's own, and are given back when the graph is compiled; anonymous memory cannot. ONNX Runtime reads weights into
memory of its own.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.contenders import AUTO
from benchmarks.large_bundle import describe, large_bundle
from benchmarks.machine import describe_machine
from benchmarks.processes import Server, ours, serving
from benchmarks.result import Bar, Result
from benchmarks.settings import Settings

ROUNDS = 3
ENGINES = (AUTO, "openvino", "onnx")
WANTED_S, WANTED_TIMES = 15.0, 1.3


@dataclass(frozen=True)
class Start:
    """One start of a server.

    Attributes:
        ready_s: Until its port opened.
        resident_bytes: Resident memory thereafter, VmRSS.
        anonymous_bytes: As much of that as no file stands behind, RssAnon.
        peak_bytes: The highest resident memory until then, VmHWM.
    """

    ready_s: float
    resident_bytes: int
    anonymous_bytes: int
    peak_bytes: int


def run(settings: Settings, command: str) -> Result:
    """Start a server on each engine, in turns."""
    machine = describe_machine()
    bundle = large_bundle(settings)
    rounds = settings.rounds(ROUNDS)
    starts: dict[str, list[Start]] = {engine: [] for engine in ENGINES}
    for _ in tqdm(range(rounds), desc="large_start", unit="round"):
        for engine in ENGINES:
            with serving([*ours(bundle.path), "--engine", engine]) as server:
                starts[engine].append(_measure(server))

    def times(engine: str, attribute: str) -> float:
        return float(np.median([getattr(start, attribute) for start in starts[engine]])) / bundle.size_bytes

    return Result(
        name="large_start",
        machine=machine,
        command=command,
        columns=("", "ready after s", "slowest s", "resident", "of that anonymous", "peak", "resident GB"),
        rows=tuple(
            (
                f"**{engine}**" if engine == AUTO else engine,
                f"{np.median([start.ready_s for start in starts[engine]]):.1f}",
                f"{max(start.ready_s for start in starts[engine]):.1f}",
                *(f"{times(engine, f'{what}_bytes'):.2f} times" for what in ("resident", "anonymous", "peak")),
                f"{times(engine, 'resident_bytes') * bundle.size_bytes / 1e9:.2f}",
            )
            for engine in ENGINES
        ),
        series=(),
        bars=tuple(
            bar
            for engine in ENGINES[:2]
            for bar in (
                _bar_time(engine, max(start.ready_s for start in starts[engine])),
                _bar_memory(engine, times(engine, "resident_bytes")),
            )
        ),
        facts={"policy": describe(bundle), "rounds": f"{rounds} starts on each engine, in turns; medians"},
    )


def _measure(server: Server) -> Start:
    lines = Path(f"/proc/{server.process_id}/status").read_text(encoding="ascii").splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    resident, anonymous, peak = (int(status[name][0]) * 1024 for name in ("VmRSS", "RssAnon", "VmHWM"))
    return Start(server.started_in_s, resident, anonymous, peak)


def _bar_time(engine: str, got_s: float) -> Bar:
    claim = f"a MoDE policy of released size answers {WANTED_S:g} s after its server was started ({engine})"
    return Bar(claim, f"{got_s:.1f} s at the slowest", got_s < WANTED_S)


def _bar_memory(engine: str, got: float) -> Bar:
    claim = f"it then holds less than {WANTED_TIMES:g} times its weights' size in resident memory ({engine})"
    return Bar(claim, f"{got:.2f} times", got < WANTED_TIMES)
