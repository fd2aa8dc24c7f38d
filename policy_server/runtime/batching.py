"""Which calls the engine runs next, together: earliest deadline first, fair among tenants, as large as pays."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import TypeVar

from policy_models.program import GraphCall
from policy_server.runtime.costs import Costs, Kind, name_of, rows_of


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


_deadline, _tenant = attrgetter("deadline_s"), attrgetter("tenant")
WorkT = TypeVar("WorkT", bound=Work)


class Shares:
    """How much of the engine each tenant has had: start-time fair queueing (Goyal, Vin and Cheng 1996).

    A tenant is charged for its part of the rows of each run. Whoever has had least goes first, and a tenant that comes,
    or comes back, begins where the others are: it is owed nothing for the time that it was away, and owes nothing.
    """

    def __init__(self) -> None:
        self._present: Counter[str] = Counter()
        self._used_s: dict[str, float] = {}
        self._reached_s = 0.0  # what the tenant that was served last had had until then

    def enter(self, tenant: str) -> None:
        """Note that a tenant has one more thing to do."""
        if not self._present[tenant]:
            self._used_s[tenant] = max(self.used_s(tenant), self._reached_s)
        self._present[tenant] += 1

    def leave(self, tenant: str) -> None:
        """Note that a tenant has one thing less to do."""
        self._present[tenant] -= 1
        if self._present[tenant] > 0:
            return
        del self._present[tenant]
        if not self._present:
            self._used_s, self._reached_s = {}, 0.0
            return
        # Those who are gone matter for as long as they are ahead of the others.
        ahead = {name: used_s for name, used_s in self._used_s.items() if used_s > self._reached_s}
        self._used_s = ahead | {name: self._used_s[name] for name in self._present}

    def charge(self, batch: Sequence[Work], took_s: float) -> None:
        """Charge the tenants of a run for what it took."""
        self._reached_s = max(self._reached_s, min(self.used_s(work.tenant) for work in batch))
        for work in batch:
            self._used_s[work.tenant] = self.used_s(work.tenant) + took_s / len(batch)

    def used_s(self, tenant: str) -> float:
        """Return what a tenant has had."""
        return self._used_s.get(tenant, 0.0)

    def in_turn(self, waiting: Sequence[WorkT]) -> list[WorkT]:
        """Return the works whose turn it is, the first of them first.

        Tenants take turns, whoever has had least first; the works of one tenant go by their deadlines. Nobody has more
        turns than the second busiest has works: one that floods must not make a run longer than it makes it fairer.
        """
        by_deadline = sorted(waiting, key=_deadline)
        counts = Counter(map(_tenant, waiting)).most_common(2)
        if len(counts) == 1:
            return by_deadline
        most, turns, keyed = counts[1][1], Counter[str](), []
        for work in by_deadline:
            turn = turns[work.tenant]
            turns[work.tenant] += 1
            if turn < most:
                keyed.append(((turn, self.used_s(work.tenant)), work))
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
