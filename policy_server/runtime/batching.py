"""Which calls the engine runs next, together: earliest deadline first, fair among tenants, as large as pays."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import TypeVar

from policy_models.program import GraphCall
from policy_server.runtime.costs import Costs, Kind, name_of, rows_of

# What a tenant had is forgotten with this time constant, and differences below `_ABOUT_S` are none.
_LATELY_S, _ABOUT_S, _NOTHING_S = 1.0, 0.02, 1e-6


@dataclass(eq=False)
class Work:
    """A dialogue that waits for an answer.

    Attributes:
        call: What it waits for.
        deadline_s: Monotonic time after which its chunk is worthless.
        tenant: Who pays for it.
        needs_s: What its calls take if they run alone, this one and those after it; 0 if that is not known.
        rows: How many rows the call has.
        kind: What kind of run the call is alone.
        fits: Calls with an equal value can be rows of one run.
    """

    call: GraphCall
    deadline_s: float
    tenant: str
    needs_s: float = 0.0
    rows: int = field(init=False)
    kind: Kind = field(init=False)
    fits: Hashable = field(init=False)

    def __post_init__(self) -> None:
        self.ask(self.call)

    def ask(self, call: GraphCall) -> None:
        """Wait for another call."""
        self.call = call
        self.rows = rows_of(call)
        shapes = tuple([(name, array.shape[1:], array.dtype.char) for name, array in call.inputs.items()])
        self.kind = Kind(name_of(call), mixed=False)
        self.fits = (self.kind, shapes)


_deadline = attrgetter("deadline_s")
WorkT = TypeVar("WorkT", bound=Work)


class Shares:
    """How much of the engine each tenant has had lately: seconds of its runs, by its part of their rows."""

    def __init__(self) -> None:
        self._used_s: dict[str, float] = {}
        self._at_s = 0.0

    def charge(self, batch: Sequence[Work], took_s: float, now_s: float) -> None:
        """Charge the tenants of a run for what it took; what they had before counts ever less."""
        left = math.exp(min(0.0, self._at_s - now_s) / _LATELY_S)
        self._used_s = {tenant: left * used for tenant, used in self._used_s.items() if left * used > _NOTHING_S}
        self._at_s = max(self._at_s, now_s)
        for work in batch:
            self._used_s[work.tenant] = self._used_s.get(work.tenant, 0.0) + took_s / len(batch)

    def used_s(self, tenant: str) -> float:
        """Return what a tenant has had lately."""
        return self._used_s.get(tenant, 0.0)

    def in_turn(self, waiting: Sequence[WorkT]) -> list[WorkT]:
        """Return the works whose turn it is, the first of them first.

        Tenants that have had more than the others wait while those have work. Among tenants that have had about the
        same nobody has a second turn before all have had one; the works of one tenant go by their deadlines.
        """
        by_deadline = sorted(waiting, key=_deadline)
        tenants = {work.tenant for work in waiting}
        if len(tenants) == 1:
            return by_deadline
        least_s = min(map(self.used_s, tenants))
        turns: Counter[str] = Counter()
        keyed = []
        for work in by_deadline:
            used_s = self.used_s(work.tenant)
            if used_s <= least_s + _ABOUT_S:
                keyed.append(((turns[work.tenant], used_s), work))
                turns[work.tenant] += 1
        keyed.sort(key=itemgetter(0))
        return [work for _, work in keyed]


def choose(waiting: Sequence[WorkT], costs: Costs, shares: Shares, now_s: float, *, takers: int = 1) -> list[WorkT]:
    """Return the works whose calls are run next, as one batch; none is lost by not being chosen.

    The first is the one with the earliest deadline of the tenant that has had the least. Those with the same graph
    join it in the same order: all of them, or those that go the same way, or fewer, whichever costs the least a row by
    what was measured; and never so many that the first would miss its deadline for it.

    Args:
        waiting: At least one.
        costs: What runs cost.
        shares: What tenants have had.
        now_s: Monotonic time.
        takers: How many threads want a batch now, this one included; each gets its part.
    """
    if len(waiting) == 1:
        return list(waiting)
    ordered = shares.in_turn(waiting)
    first = ordered[0]
    alike = [work for work in ordered if work.fits == first.fits]
    alike = alike[: math.ceil(len(alike) / takers)]
    together = _affordable(alike, costs, first, now_s)
    same_way = [work for work in alike if work.call.way == first.call.way]
    if len(same_way) == len(alike):
        return together
    apart = _affordable(same_way, costs, first, now_s)
    return min((together, apart), key=lambda batch: costs.of_s(kind_of(batch), _rows(batch)) / _rows(batch))


def kind_of(batch: Sequence[Work]) -> Kind:
    """Return what kind of run a batch is."""
    first = batch[0]
    mixed = any(work.call.way != first.call.way for work in batch)
    return Kind(first.kind.graph, mixed=True) if mixed else first.kind


def _affordable(works: Sequence[WorkT], costs: Costs, first: WorkT, now_s: float) -> list[WorkT]:
    kind = kind_of(works)
    most = costs.best_rows(kind, _rows(works))
    alone_s = costs.of_s(first.kind, first.rows)
    # What comes after this call will run in such company too, and be slowed as much.
    while most > 1 and alone_s and now_s + first.needs_s * costs.of_s(kind, most) / alone_s > first.deadline_s:
        most //= 2
    batch, rows = [first], first.rows
    for work in works[1:]:
        rows += work.rows
        if rows > most:
            break
        batch.append(work)
    return batch


def _rows(batch: Sequence[Work]) -> int:
    return sum(work.rows for work in batch)
