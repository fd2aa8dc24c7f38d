"""What is said while sorting: a closed grammar of orders, one of reasonings, and what training never shows."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations, product
from typing import Literal

COLOURS = ("red", "green", "blue", "yellow")
KINDS = ("cube", "ball", "ring", "bar")
BINS = ("left", "right")

Form = Literal["thing", "kind", "colour", "colours", "kinds"]  # what an order names


@dataclass(frozen=True)
class Thing:
    """An object on the table; no two on one table are alike."""

    colour: str
    kind: str

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


THINGS = tuple(Thing(colour, kind) for colour, kind in product(COLOURS, KINDS))

Combination = tuple[Thing, str]  # a thing and the bin that it is put in


def _is_held_out(thing: Thing, bin_: str) -> bool:
    return (COLOURS.index(thing.colour) + KINDS.index(thing.kind)) % 4 == (0 if bin_ == "left" else 2)


COMBINATIONS = tuple(product(THINGS, BINS))
# A quarter of all: of every colour and of every kind one thing for each bin. All of them are moved in training, but to
# the other bin only.
HELD_OUT = frozenset(combination for combination in COMBINATIONS if _is_held_out(*combination))
TRAINED = frozenset(COMBINATIONS) - HELD_OUT


@dataclass(frozen=True)
class Clause:
    """Where all things of one description go."""

    bin: str
    colour: str | None = None  # None: any
    kind: str | None = None

    def covers(self, thing: Thing) -> bool:
        """Whether `thing` is meant."""
        return self.colour in (None, thing.colour) and self.kind in (None, thing.kind)


@dataclass(frozen=True)
class Order:
    """An instruction, in words and in what it means. Its clauses speak of different things."""

    form: Form
    instruction: str
    clauses: tuple[Clause, ...]

    def bin_of(self, thing: Thing) -> str | None:
        """Return where `thing` shall go, or None if it shall stay."""
        return next((clause.bin for clause in self.clauses if clause.covers(thing)), None)


def _orders() -> Iterator[Order]:
    for thing, bin_ in COMBINATIONS:
        clause = Clause(bin_, thing.colour, thing.kind)
        yield Order("thing", f"put the {thing} in the {bin_} bin", (clause,))
        yield Order("thing", f"move the {thing} to the {bin_} bin", (clause,))
    for kind, bin_ in product(KINDS, BINS):
        yield Order("kind", f"put the {kind}s in the {bin_} bin", (Clause(bin_, kind=kind),))
    for colour, bin_ in product(COLOURS, BINS):
        yield Order("colour", f"put everything {colour} in the {bin_} bin", (Clause(bin_, colour=colour),))
    for left, right in permutations(COLOURS, 2):
        clauses = (Clause("left", colour=left), Clause("right", colour=right))
        yield Order("colours", f"sort by colour: {left} left, {right} right", clauses)
    for left, right in permutations(KINDS, 2):
        clauses = (Clause("left", kind=left), Clause("right", kind=right))
        yield Order("kinds", f"sort by kind: {left}s left, {right}s right", clauses)


ORDERS = {order.instruction: order for order in _orders()}


@dataclass(frozen=True)
class Thought:
    """What is to be done next: one thing, from where it is to where it belongs."""

    thing: Thing
    at: str  # "hand", "table", or a bin
    goal: str  # "table" or a bin


def say(thought: Thought | None) -> str:
    """Return the reasoning of `thought` in words; None is to have nothing left to do."""
    if thought is None:
        return "All done."
    if thought.at == "hand":
        return f"Holding the {thought.thing}, carry it to the {_named(thought.goal)}."
    at, goal = (f"{'on' if place == 'table' else 'in'} the {_named(place)}" for place in (thought.at, thought.goal))
    return f"The {thought.thing} is {at}. Pick it up and put it {goal}."


def _named(place: str) -> str:
    return f"{place} bin" if place in BINS else place


def _thoughts() -> Iterator[Thought | None]:
    yield None
    places = ("table", *BINS)
    for thing, goal in product(THINGS, places):
        yield Thought(thing, "hand", goal)
    for thing, (one, other) in product(THINGS, combinations(places, 2)):
        yield Thought(thing, one, other)
        yield Thought(thing, other, one)


THOUGHTS = {say(thought): thought for thought in _thoughts()}
