"""The sorting table without its looks: where things lie, what the hand does to them, and when an order is carried out.

Positions are in metres, x to the right and y away from the camera, with the middle of the table at (0, 0).
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from policy_sim.sorting_words import BINS, HELD_OUT, ORDERS, THINGS, TRAINED, Combination, Form, Order, Thing

STEP_S = 0.1
ACTION_WIDTH = 3
STATE_WIDTH = 3
TOP_SPEED_M_S = 0.8  # on each axis
REACH_M = 0.045  # a hand that closes takes what lies within this distance

HAND_HALF_M = (0.4, 0.36)  # the hand's workspace, from the middle
START_HALF_M = (0.15, 0.28)  # things begin here
BIN_HALF_M = (0.09, 0.34)
BIN_X_M = {"left": -0.33, "right": 0.33}

FIRST_HELD_OUT_SEED = 2**31  # demonstrations begin with smaller seeds, evaluations with this one and larger

_APART_M = 0.17  # between the middles of two things, at the beginning
_FEWEST_THINGS, MOST_THINGS = 2, 3  # on one table
_FORMS: dict[Form, float] = {"thing": 0.4, "kind": 0.15, "colour": 0.15, "colours": 0.15, "kinds": 0.15}
_TASK_STREAM = 5003  # set before the seed

Place = tuple[float, float]


@dataclass(frozen=True)
class Task:
    """A table with an order."""

    order: Order
    things: tuple[Thing, ...]
    places: tuple[Place, ...]
    yaws_rad: tuple[float, ...]
    hand: Place

    @property
    def moves(self) -> dict[Thing, str]:
        """The bin of every thing that the order speaks of."""
        return {thing: bin_ for thing in self.things if (bin_ := self.order.bin_of(thing)) is not None}


@dataclass(frozen=True)
class Scene:
    """All there is to know of one moment.

    The hand is over the table and never in the way: it takes the nearest thing within reach while it is closed, carries
    it above the others, and drops it where it opens.
    """

    task: Task
    hand: Place
    velocity: Place  # of the hand during the last step, m/s
    closed: bool
    held: int | None  # which thing
    places: tuple[Place, ...]

    @classmethod
    def of(cls, task: Task) -> "Scene":
        """Return the beginning of a task."""
        return cls(task, task.hand, (0.0, 0.0), closed=False, held=None, places=task.places)

    @property
    def state(self) -> np.ndarray:
        """What the robot knows of itself: x m, y m, whether it holds something (0 or 1); (3,) float32."""
        return np.array([*self.hand, self.held is not None], dtype=np.float32)

    def whereabouts(self, i: int) -> str:
        """Return where the i-th thing is: "hand", "left", "right" or "table"."""
        if i == self.held:
            return "hand"
        return next((bin_ for bin_ in BINS if _is_inside(self.places[i], bin_)), "table")

    @cached_property
    def done(self) -> bool:
        """Whether everything the order speaks of lies in its bin, and nothing else lies in any."""
        return all(
            self.whereabouts(i) == (self.task.order.bin_of(thing) or "table")
            for i, thing in enumerate(self.task.things)
        )

    def after(self, action: np.ndarray) -> "Scene":
        """Return the scene one control step later.

        Args:
            action: (vx m/s, vy m/s, grip), (3,); velocities are clipped to the top speed, the hand stays in its
                workspace, and grip closes the hand if it is positive.

        Raises:
            ValueError: `action` is not three finite numbers.
        """
        if np.shape(action) != (ACTION_WIDTH,) or not np.isfinite(action).all():
            raise ValueError(f"action is {action!r}, expected three finite numbers")
        vx_m_s, vy_m_s, grip = (float(value) for value in action)
        hand = (
            _clip(self.hand[0] + STEP_S * _clip(vx_m_s, TOP_SPEED_M_S), HAND_HALF_M[0]),
            _clip(self.hand[1] + STEP_S * _clip(vy_m_s, TOP_SPEED_M_S), HAND_HALF_M[1]),
        )
        closed = grip > 0.0
        places = self.places
        held = self.held
        if held is None and closed:
            near_m, nearest = min((math.dist(place, hand), i) for i, place in enumerate(places))
            held = nearest if near_m < REACH_M else None
        if held is not None:
            places = (*places[:held], hand, *places[held + 1 :])
        return replace(
            self,
            hand=hand,
            velocity=((hand[0] - self.hand[0]) / STEP_S, (hand[1] - self.hand[1]) / STEP_S),
            closed=closed,
            held=held if closed else None,
            places=places,
        )


def draw_task(seed: int, *, held_out: bool = False) -> Task:
    """Draw a table of two or three things with an order; equal seeds give equal tasks.

    Args:
        seed: Decides everything. Those from `FIRST_HELD_OUT_SEED` on are for evaluation.
        held_out: Whether everything to be moved is a combination of `HELD_OUT`, instead of one of `TRAINED`. What is
            to stay may be any thing.
    """
    rng = np.random.default_rng([_TASK_STREAM, held_out, seed])
    pool = HELD_OUT if held_out else TRAINED
    form = rng.choice(list(_FORMS), p=list(_FORMS.values()))
    orders = [order for order in ORDERS.values() if order.form == form]
    things: tuple[Thing, ...] | None = None
    while things is None:
        order = orders[rng.integers(len(orders))]
        things = _things_for(order, pool, rng)
    places = _places_for(len(things), rng)
    yaws_rad = tuple(rng.uniform(-math.pi / 2, math.pi / 2, size=len(things)).tolist())
    hand_x_m, hand_y_m = rng.uniform(-1.0, 1.0, size=2) * HAND_HALF_M
    return Task(order, things, places, yaws_rad, (float(hand_x_m), float(hand_y_m)))


def held_out_seeds(count: int) -> range:
    """Return seeds that no demonstration began with."""
    return range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + count)


def _things_for(order: Order, pool: frozenset[Combination], rng: np.random.Generator) -> tuple[Thing, ...] | None:
    """Draw things that give every clause of `order` something to move, all from `pool`; None if that failed."""
    things: list[Thing] = []
    for clause in order.clauses:
        choices = [thing for thing in THINGS if clause.covers(thing) and (thing, clause.bin) in pool]
        if not choices:
            return None
        things.append(choices[rng.integers(len(choices))])
    # What remains may be moved too if the pool allows it.
    others = [
        thing
        for thing in THINGS
        if thing not in things and ((bin_ := order.bin_of(thing)) is None or (thing, bin_) in pool)
    ]
    missing = int(rng.integers(_FEWEST_THINGS, MOST_THINGS + 1)) - len(things)
    things += [others[i] for i in rng.choice(len(others), size=missing, replace=False)]
    return tuple(things[i] for i in rng.permutation(len(things)))


def _places_for(count: int, rng: np.random.Generator) -> tuple[Place, ...]:
    places: list[Place] = []
    while len(places) < count:
        x_m, y_m = rng.uniform(-1.0, 1.0, size=2) * START_HALF_M
        if all(math.dist((x_m, y_m), place) >= _APART_M for place in places):
            places.append((float(x_m), float(y_m)))
    return tuple(places)


def _is_inside(place: Place, bin_: str) -> bool:
    return abs(place[0] - BIN_X_M[bin_]) < BIN_HALF_M[0] and abs(place[1]) < BIN_HALF_M[1]


def _clip(value: float, limit: float) -> float:
    return min(limit, max(-limit, value))
