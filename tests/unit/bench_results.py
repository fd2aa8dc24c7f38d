"""Load tests in virtual time, against servers whose delays are known."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from policy_client.bench.arrivals import Arrivals
from policy_client.bench.measures import Fates, summarise
from policy_client.bench.result import Result, Test

Floats = NDArray[np.float64]


def virtual_result(
    arrivals: Arrivals,
    delay_s: Callable[[Floats], Floats],
    *,
    robots: int = 4,
    seconds: float = 20.0,
    deadline_ms: float = 100.0,
    step_s: float = 0.05,
    horizon: int = 10,
    sent_late_s: float = 1e-4,
    seed: int = 0,
) -> Result:
    """Return the result of a test whose observations, due at times (N,), are answered after `delay_s` of them.

    A delay of NaN means never.
    """
    times = [arrivals.times(robot, seconds, seed) for robot in range(robots)]
    robot = np.repeat(np.arange(robots), [len(own) for own in times])
    due_s = np.concatenate(times)
    wait_s = delay_s(due_s)
    never = int(np.isnan(wait_s).sum())
    fates = Fates(
        robot=robot,
        due_s=due_s,
        sent_s=due_s + sent_late_s,
        received_s=due_s + wait_s,
        superseded=np.zeros(len(due_s), np.bool_),
        horizon=np.full(len(due_s), horizon),
        stages_ms={"inference": 500 * wait_s},
        failures={"no_answer": never} if never else {},
    )
    rate_hz = arrivals.rate_at(seconds)
    test = Test(
        "http://robots.example",
        "openpi",
        "maze",
        "1",
        "onnx",
        "periodic",
        robots,
        rate_hz,
        seconds,
        deadline_ms,
        step_s,
        seed,
        1,
    )
    return summarise(
        fates, test, made_at="2026-01-01T00:00:00+00:00", command="policy-bench run", machine={"cores": "2"}
    )


def stalled(every_s: float, stall_s: float, service_s: float) -> Callable[[Floats], Floats]:
    """Return the delays of a server that answers in `service_s`, but stalls for the first `stall_s` of `every_s`."""
    return lambda due_s: np.maximum(stall_s - due_s % every_s, 0) + service_s
