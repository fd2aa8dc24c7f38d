"""Which simulator a policy belongs to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from policy_models.spec import PolicySpec
from policy_sim.trial import Trial


@dataclass(frozen=True)
class Simulator:
    """A world that policies can be evaluated in.

    Attributes:
        name: What the command line calls it.
        action: Names of the numbers that its robot is driven with.
        state: Names of the numbers that its robot knows of itself; none if it is not told.
        cameras: Names of its cameras.
        new_trial: Makes one; what it needs is imported then.
    """

    name: str
    action: tuple[str, ...]
    state: tuple[str, ...]
    cameras: frozenset[str]
    new_trial: Callable[[], Trial]

    def misfit(self, spec: PolicySpec) -> str | None:
        """Return why a policy of this spec cannot drive the simulator's robot; None if it can.

        A policy need not look at everything that there is, but what it looks at must be there.
        """
        if spec.action.names != self.action:
            return f"the policy gives {_listed(spec.action.names)}, the robot takes {_listed(self.action)}"
        if spec.state is not None and spec.state.names != self.state:
            return f"the policy wants the state {_listed(spec.state.names)}, the robot has {_listed(self.state)}"
        missing = [camera.name for camera in spec.cameras if camera.name not in self.cameras]
        if missing:
            return f"the policy wants cameras {_listed(missing)}, the robot has {_listed(sorted(self.cameras))}"
        return None


def _point_maze() -> Trial:
    from policy_sim.point_maze_trial import PointMazeTrial

    return PointMazeTrial()


def _meta_world() -> Trial:
    from policy_sim.meta_world_trial import MetaWorldTrial

    return MetaWorldTrial()


def _sorting() -> Trial:
    from policy_sim.sorting_trial import SortingTrial

    return SortingTrial()


def _flights() -> Trial:
    from policy_sim.flights_trial import FlightsTrial

    return FlightsTrial()


SIMULATORS = {
    simulator.name: simulator
    for simulator in (
        Simulator("point-maze", ("force_x", "force_y"), ("x", "y", "vx", "vy"), frozenset(), _point_maze),
        Simulator("meta-world", ("dx", "dy", "dz", "gripper"), (), frozenset({"static", "wrist"}), _meta_world),
        Simulator("sorting", ("vx", "vy", "grip"), ("x", "y", "holding"), frozenset({"top"}), _sorting),
        Simulator("flights", ("forward", "left", "up", "yaw_rate"), (), frozenset({"front"}), _flights),
    )
}


def simulator_for(spec: PolicySpec, name: str = "") -> Simulator:
    """Return the simulator whose robot a policy can drive.

    Args:
        spec: The policy's.
        name: Take this one, whatever others fit.

    Raises:
        ValueError: There is none of that name, or the policy does not fit; the message says why.
    """
    if name and name not in SIMULATORS:
        raise ValueError(f"there is no simulator {name!r}; there are {_listed(SIMULATORS)}")
    misfits = {each: SIMULATORS[each].misfit(spec) for each in ([name] if name else SIMULATORS)}
    for each, misfit in misfits.items():
        if misfit is None:
            return SIMULATORS[each]
    reasons = "; ".join(f"{each}: {misfit}" for each, misfit in misfits.items())
    raise ValueError(f"no simulator fits this policy. {reasons}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
