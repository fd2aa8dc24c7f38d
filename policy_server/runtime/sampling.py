"""Drives a program's dialogue with an engine to its end."""

from policy_models.program import Dialogue, Outcome
from policy_server.engine.base import Engine
from policy_server.runtime.deadline import Deadline


def drive(dialogue: Dialogue, engine: Engine, deadline: Deadline | None = None) -> Outcome:
    """Answer every graph call of `dialogue` with `engine`.

    Raises:
        DeadlineExceeded: `deadline` passed before a step; the steps after it are never computed.
    """
    try:
        call = next(dialogue)
        while True:
            if deadline is not None:
                deadline.check()
            call = dialogue.send(engine.run(call.graph, call.inputs))
    except StopIteration as finished:
        outcome: Outcome = finished.value
        return outcome
