"""Drives a program's dialogue with an engine to its end."""

from policy_models.program import Dialogue, GraphCall, Outcome
from policy_server.engine.base import Engine
from policy_server.runtime.deadline import Deadline


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
            call = dialogue.send(engine.run(call.graph, call.inputs))
    except StopIteration as finished:
        outcome: Outcome = finished.value
        return outcome
