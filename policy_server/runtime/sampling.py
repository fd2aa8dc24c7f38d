"""Drives programs' dialogues with an engine to their end: one alone, or several that share its batches."""

from collections.abc import Callable, Generator, Sequence
from typing import cast

import numpy as np

from policy_models.program import Dialogue, GraphCall, Outcome, UnsuitableGoal, UnsuitableOptions
from policy_server.engine.base import DifferentiableEngine, Engine, Tensors
from policy_server.errors import Abandoned, InvalidOption, UnusableGoal
from policy_server.runtime.deadline import Deadline


def begin(dialogue: Generator[GraphCall, Tensors, object]) -> GraphCall:
    """Return the first call of a fresh dialogue; raises StopIteration with the outcome if it asks no graph.

    Raises:
        InvalidOption: The policy cannot be sampled like that.
        UnusableGoal: The policy can make nothing of the goal.
    """
    try:
        return next(dialogue)
    except UnsuitableOptions as error:
        raise InvalidOption(f"'options': {error}") from error
    except UnsuitableGoal as error:
        raise UnusableGoal(str(error)) from error


def drive(dialogue: Dialogue, engine: Engine, deadline: Deadline | None = None) -> Outcome:
    """Answer every graph call of a fresh `dialogue` with `engine`; raises DeadlineExceeded."""
    try:
        return resume(dialogue, next(dialogue), engine, deadline)
    except StopIteration as finished:
        outcome: Outcome = finished.value
        return outcome


def resume(dialogue: Dialogue, call: GraphCall, engine: Engine, deadline: Deadline | None) -> Outcome:
    """Answer `call`, which `dialogue` waits for, and every one after it.

    Raises:
        DeadlineExceeded: `deadline` passed before a step; the steps after it are never computed.
    """
    try:
        while True:
            if deadline is not None:
                deadline.check()
            call = dialogue.send(answer(call, engine))
    except StopIteration as finished:
        outcome: Outcome = finished.value
        return outcome


def drive_together(
    dialogues: Sequence[Dialogue], engine: Engine, is_wanted: Callable[[int], bool]
) -> list[Outcome | Exception]:
    """Answer several fresh dialogues; calls of the same graph that wait at the same time are one run of the engine.

    Args:
        dialogues: One for each robot.
        engine: Answers them.
        is_wanted: Asked before every step with a dialogue's place in `dialogues`; one that nobody waits for any more
            is dropped, and the others go on.

    Returns:
        For each dialogue its outcome, or the error that ended it.
    """
    results: dict[int, Outcome | Exception] = {}
    waiting: dict[int, GraphCall] = {}

    def advance(place: int, reply: Tensors | None) -> None:
        waiting.pop(place, None)
        try:
            dialogue = dialogues[place]
            waiting[place] = begin(dialogue) if reply is None else dialogue.send(reply)
        except StopIteration as finished:
            results[place] = finished.value
        except Exception as error:  # one robot's error is no other's
            results[place] = error

    for place in range(len(dialogues)):
        advance(place, None)
    while waiting:
        for place in [place for place in waiting if not is_wanted(place)]:
            dialogues[place].close()
            results[place] = Abandoned()
            del waiting[place]
        for places in _alike(waiting).values():
            try:
                answers = run_together([waiting[place] for place in places], engine)
            except Exception as error:
                results.update(dict.fromkeys(places, error))
                for place in places:
                    del waiting[place]
                continue
            for place, reply in zip(places, answers, strict=True):
                advance(place, reply)
    return [results[place] for place in range(len(dialogues))]


def _alike(waiting: dict[int, GraphCall]) -> dict[object, list[int]]:
    """Return the places whose calls can share a run, by graph and by the shape of a row."""
    groups: dict[object, list[int]] = {}
    for place, call in waiting.items():
        shapes = tuple((name, array.shape[1:], array.dtype) for name, array in call.inputs.items())
        groups.setdefault((call.graph, call.cotangent is None, shapes), []).append(place)
    return groups


def run_together(calls: Sequence[GraphCall], engine: Engine) -> list[Tensors]:
    """Answer calls of the same graph and the same shapes with one run of the engine, in their order."""
    if len(calls) == 1:
        return [answer(calls[0], engine)]
    together = {name: np.concatenate([call.inputs[name] for call in calls]) for name in calls[0].inputs}
    cotangents = [call.cotangent for call in calls if call.cotangent is not None]
    outputs = answer(
        GraphCall(calls[0].graph, together, cotangent=np.concatenate(cotangents) if cotangents else None), engine
    )
    parts: list[Tensors] = []
    start = 0
    for call in calls:
        end = start + len(next(iter(call.inputs.values())))
        parts.append({name: array[start:end] for name, array in outputs.items()})
        start = end
    return parts


def answer(call: GraphCall, engine: Engine) -> Tensors:
    """Answer one call."""
    if call.cotangent is None:
        return engine.run(call.graph, call.inputs)
    assert engine.differentiable, "a program asks for gradients only where it is told that there are some"
    return cast(DifferentiableEngine, engine).run_with_gradient(call.graph, call.inputs, call.cotangent)
