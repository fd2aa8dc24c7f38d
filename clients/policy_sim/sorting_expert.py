"""The scripted sorter: thinks of the next thing to move, says so, and moves it."""

import math

import numpy as np

from policy_sim.sorting_scene import BIN_X_M, START_HALF_M, STEP_S, TOP_SPEED_M_S, Place, Scene
from policy_sim.sorting_words import THOUGHTS, Thought, say

CHUNK_STEPS = 16

_OPEN, _CLOSED = -1.0, 1.0
_ARRIVED_M = 0.025  # well within the reach
_GAIN_PER_S = 5.0  # half the way that is left, each step
_ACCELERATION_M_S2 = 4.0  # from rest to the top speed in two steps
_FREE_M = 0.13  # a spot is free if nothing else lies this near
_SPOTS_Y_M = (-0.22, 0.0, 0.22)
_SPOTS: dict[str, tuple[Place, ...]] = {
    **{bin_: tuple((x_m, y_m) for y_m in _SPOTS_Y_M) for bin_, x_m in BIN_X_M.items()},
    "table": tuple((x_m, y_m) for x_m in (-START_HALF_M[0], 0.0, START_HALF_M[0]) for y_m in _SPOTS_Y_M),
}


def think(scene: Scene) -> Thought | None:
    """Return what to do next, or None if the order is carried out.

    What is in the hand comes first; then what the order speaks of, clause by clause and from left to right; then
    whatever lies in a bin and should not.
    """
    task = scene.task
    if scene.held is not None:
        thing = task.things[scene.held]
        return Thought(thing, "hand", task.order.bin_of(thing) or "table")
    left_to_right = sorted(range(len(task.things)), key=lambda i: scene.places[i])
    for clause in (*task.order.clauses, None):
        for i in left_to_right:
            thing, at = task.things[i], scene.whereabouts(i)
            goal = task.order.bin_of(thing) or "table"
            if at != goal and (clause is None or clause.covers(thing)):
                return Thought(thing, at, goal)
    return None


def act(scene: Scene, thought: Thought | None) -> np.ndarray:
    """Return the action that follows `thought`, right or wrong.

    Another thing in the hand is dropped first. Once the thing lies where it should, the hand rests.

    Returns:
        (vx m/s, vy m/s, grip), (3,) float32; the speed is at most `TOP_SPEED_M_S`, and changes by 4 m/s² at most.

    Raises:
        ValueError: `thought` is of a thing that is not in the scene.
    """
    if thought is None:
        return _action(0.0, 0.0, _OPEN)
    i = scene.task.things.index(thought.thing)
    at = scene.whereabouts(i)
    if at == thought.goal or (scene.held is not None and at != "hand"):
        return _action(0.0, 0.0, _OPEN)
    target = _spot(scene, i, thought.goal) if at == "hand" else scene.places[i]
    arrived = math.dist(scene.hand, target) < _ARRIVED_M
    if arrived:
        return _action(0.0, 0.0, _OPEN if at == "hand" else _CLOSED)
    return _action(*_velocity(scene, target), _CLOSED if at == "hand" else _OPEN)


def plan(scene: Scene, thought: Thought | None, steps: int = CHUNK_STEPS) -> np.ndarray:
    """Return the actions that follow `thought` to its end and then rest, (steps, 3) float32."""
    actions = np.zeros((steps, 3), dtype=np.float32)
    for row in actions:
        row[:] = act(scene, thought)
        scene = scene.after(row)
    return actions


def score_reasoning(text: str, scene: Scene) -> bool:
    """Whether a reasoning is in the grammar and right: the thing is one to move, from where it is to where it belongs.

    Any thing that is still to be moved will do, not only the one that the expert thinks of. "All done." is right when
    it is so.
    """
    if text.strip() not in THOUGHTS:
        return False
    return THOUGHTS[text.strip()] in right_thoughts(scene)


def right_thoughts(scene: Scene) -> set[Thought | None]:
    """Return every thought that is right now: one for each thing to be moved, or None alone if there is none."""
    if scene.held is not None:
        return {think(scene)}
    thoughts = {
        Thought(thing, at, goal)
        for i, thing in enumerate(scene.task.things)
        if (at := scene.whereabouts(i)) != (goal := scene.task.order.bin_of(thing) or "table")
    }
    return {*thoughts} or {None}


def wrong_reasoning(scene: Scene, rng: np.random.Generator) -> str:
    """Draw a reasoning that could be carried out here and goes against the order: another thing, or another bin."""
    wrong = [
        thought
        for thought in THOUGHTS.values()
        if thought is not None
        and thought.goal in BIN_X_M
        and thought.thing in scene.task.things
        and thought.at == scene.whereabouts(scene.task.things.index(thought.thing))
        and thought not in right_thoughts(scene)
    ]
    return say(wrong[rng.integers(len(wrong))])


def _spot(scene: Scene, carried: int, goal: str) -> Place:
    """Return the nearest free spot of a bin or the table."""
    others = [place for i, place in enumerate(scene.places) if i != carried]

    def rank(spot: Place) -> tuple[bool, float]:
        taken = any(math.dist(spot, place) < _FREE_M for place in others)
        return taken, math.dist(spot, scene.hand)

    return min(_SPOTS[goal], key=rank)


def _velocity(scene: Scene, target: Place) -> Place:
    """Return the velocity towards `target`: it slows down before it, and does not change too much at once."""
    away_m = math.dist(scene.hand, target)
    speed_m_s = min(TOP_SPEED_M_S, _GAIN_PER_S * away_m)
    wanted = [speed_m_s * (t - h) / away_m for t, h in zip(target, scene.hand, strict=True)]
    change = math.dist(wanted, scene.velocity)
    share = min(1.0, _ACCELERATION_M_S2 * STEP_S / max(change, 1e-9))
    vx_m_s, vy_m_s = (v + share * (w - v) for v, w in zip(scene.velocity, wanted, strict=True))
    return vx_m_s, vy_m_s


def _action(vx_m_s: float, vy_m_s: float, grip: float) -> np.ndarray:
    return np.array([vx_m_s, vy_m_s, grip], dtype=np.float32)
