"""What runs of graphs cost, as measured on this machine: what batches are decided by."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import Thread
from typing import NamedTuple

import numpy as np

from policy_models.program import DIFFERENTIATED, GraphCall
from policy_server.engine.base import Engine
from policy_server.runtime.sampling import answer

ROWS = (1, 2, 4, 8, 16)
MOST_ROWS = ROWS[-1]
_RECENT = 16
_REPEATS = 5
_TINY_S = 1e-9
# Several runs at once are worth their threads from here on, measured with so many rows and runs each: if more gets
# done, and if a run takes so long that what Python does between two runs, one thread at a time, is little beside it.
_WORTH_IT, _LONG_S, _SHARED_ROWS, _SHARED_RUNS = 1.25, 1.5e-3, 4, 4


class Kind(NamedTuple):
    """What runs have in common that cost the same for the same number of rows.

    Attributes:
        graph: The graph's name, or that of its gradient.
        mixed: Whether their calls go different ways.
    """

    graph: str
    mixed: bool


class _Table:
    """What runs of one kind take, for every number of rows.

    How that grows with the rows is a matter of graph, engine and processor, and stays as it was measured while nothing
    else went on: a run under load ends only once its thread may go on in Python, which would make runs of the usual
    size look dear, and others, that are never run any more, cheap. What load tells is how quick the machine is now.
    """

    def __init__(self) -> None:
        self._calm_s: dict[int, float] = {}
        self._recent = deque[float](maxlen=_RECENT)
        self._takes_s = [0.0] * (MOST_ROWS + 1)
        self._pace = 1.0
        self.best_rows = list(range(MOST_ROWS + 1))

    def measure(self, rows: int, took_s: float) -> None:
        """Take a run as one that nothing held up, unless a quicker one is known."""
        if took_s < self._calm_s.get(rows, math.inf):
            self._calm_s[rows] = took_s
            self._settle()

    def note(self, rows: int, took_s: float) -> None:
        """Learn from a run how quick the machine is."""
        self._recent.append(took_s / max(self._takes_s[rows], _TINY_S))
        # The quickest of the last runs counts: the others were held up by whatever else the machine was doing.
        self._pace = min(self._recent)

    def takes_s(self, rows: int) -> float:
        """Return what a run takes now."""
        return self._takes_s[rows] * self._pace

    def _settle(self) -> None:
        at = sorted(self._calm_s)
        quickest_s = np.maximum.accumulate([self._calm_s[rows] for rows in at])
        every = np.arange(MOST_ROWS + 1)
        takes_s = np.interp(every, at, quickest_s)
        takes_s[at[-1] + 1 :] = quickest_s[-1] * every[at[-1] + 1 :] / at[-1]
        self._takes_s = takes_s.tolist()
        best = 1
        for rows in range(1, MOST_ROWS + 1):
            if self._takes_s[rows] * best <= self._takes_s[best] * rows:
                best = rows
            self.best_rows[rows] = best


class Costs:
    """Seconds that a run takes, by kind and by rows. Measured before the first robot comes, and kept up to date.

    Attributes:
        chunk: The calls of one chunk of one robot: the kind of run and the rows of each.
        threads: How many runs may go on at once.
        speedup: How many times as much they get done together as one alone.
        measured_at_s: Monotonic time of the last run.
    """

    def __init__(self, chunk: Sequence[tuple[Kind, int]] = ()) -> None:
        self.chunk = chunk
        self.threads = 1
        self.speedup = 1.0
        self.measured_at_s = 0.0
        self._tables: dict[Kind, _Table] = {}

    def measure(self, kind: Kind, rows: int, took_s: float) -> None:
        """Remember what a run took that nothing held up; the quickest of several with as many rows counts."""
        self._tables.setdefault(kind, _Table()).measure(rows, took_s)
        self.measured_at_s = time.monotonic()

    def note(self, kind: Kind, rows: int, took_s: float) -> None:
        """Remember what a run took under load; one of a kind that was never measured counts as measured."""
        if table := self._tables.get(kind):
            table.note(rows, took_s)
            self.measured_at_s = time.monotonic()
        else:
            self.measure(kind, rows, took_s)

    def of_s(self, kind: Kind, rows: int) -> float:
        """Return what a run takes, 0 if nothing is known.

        Between numbers of rows that were measured it is a straight line, beyond the largest one proportional.
        """
        table = self._table(kind)
        if table is None:
            return 0.0
        return table.takes_s(rows) if rows <= MOST_ROWS else table.takes_s(MOST_ROWS) * rows / MOST_ROWS

    def best_rows(self, kind: Kind, available: int) -> int:
        """Return how many of `available` rows one run should take: those that cost the least each, rather more."""
        table = self._table(kind)
        available = min(available, MOST_ROWS)
        return table.best_rows[available] if table else available

    def _table(self, kind: Kind) -> _Table | None:
        return self._tables.get(kind) or self._tables.get(Kind(kind.graph, not kind.mixed))

    def capacity_hz(self) -> float:
        """Return how many chunks a second are possible, at the number of robots that share runs best."""
        rates_hz = []
        for robots in ROWS:
            took_s = sum(self.of_s(kind, robots * rows) for kind, rows in self.chunk)
            rates_hz.append(self.speedup * robots / took_s if took_s else math.inf)
        return max(rates_hz)


def measure(calls: Sequence[GraphCall], engine: Engine, clock: Callable[[], float] = time.perf_counter) -> Costs:
    """Run each graph with every number of rows, which also warms it up; return what it took.

    Args:
        calls: The calls of one chunk, in their order.
        engine: What is measured.
        clock: Returns seconds.
    """
    costs = Costs([(Kind(name_of(call), mixed=False), rows_of(call)) for call in calls])
    gradients = [replace(c, cotangent=c.inputs[DIFFERENTIATED]) for c in calls if DIFFERENTIATED in c.inputs]
    for name, its_calls in _by_name([*calls, *(gradients if engine.differentiable else [])]).items():
        ways = list({call.way: call for call in its_calls}.values())
        for mixed, alike in ((False, ways[:1]), (True, ways))[: 2 if len(ways) > 1 else 1]:
            by_rows = {rows: _with_rows(alike, rows) for rows in ROWS[mixed:]}
            for _ in range(_REPEATS):  # in turns, so that what holds the machine up for a while spoils one of each
                for rows, call in by_rows.items():
                    started_at_s = clock()
                    answer(call, engine)
                    costs.measure(Kind(name, mixed), rows, clock() - started_at_s)
    if calls and engine.most_runs > 1:
        speedup = _speedup(calls[-1], engine, clock)
        is_long = costs.of_s(Kind(name_of(calls[-1]), mixed=False), _SHARED_ROWS) >= _LONG_S
        if speedup >= _WORTH_IT and is_long:
            costs.threads, costs.speedup = engine.most_runs, speedup
    return costs


def _speedup(call: GraphCall, engine: Engine, clock: Callable[[], float]) -> float:
    """Return how many times as many runs are done by `most_runs` threads as by one."""
    shared = _with_rows([call], _SHARED_ROWS)

    def run() -> None:
        for _ in range(_SHARED_RUNS):
            answer(shared, engine)

    def took_s(threads: int) -> float:
        workers = [Thread(target=run) for _ in range(threads)]
        started_at_s = clock()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return clock() - started_at_s

    together_s = min(took_s(engine.most_runs) for _ in range(_REPEATS))
    alone_s = min(took_s(1) for _ in range(_REPEATS))
    return engine.most_runs * alone_s / together_s


def rows_of(call: GraphCall) -> int:
    """Return how many rows a call has."""
    return len(next(iter(call.inputs.values())))


def name_of(call: GraphCall) -> str:
    """Return what runs of such calls are called."""
    return call.graph if call.cotangent is None else f"gradient of {call.graph}"


def _by_name(calls: Sequence[GraphCall]) -> Mapping[str, list[GraphCall]]:
    names: dict[str, list[GraphCall]] = {}
    for call in calls:
        names.setdefault(name_of(call), []).append(call)
    return names


def _with_rows(calls: Sequence[GraphCall], rows: int) -> GraphCall:
    """Return a call with so many rows, taken from the first rows of `calls` in turn."""
    picked = [calls[i % len(calls)] for i in range(rows)]
    inputs = {name: np.concatenate([call.inputs[name][:1] for call in picked]) for name in calls[0].inputs}
    cotangent = None if calls[0].cotangent is None else inputs[DIFFERENTIATED]
    return GraphCall(calls[0].graph, inputs, cotangent=cotangent)
