"""Observations of a load test fit the spec that the server tells, and say something."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from policy_client.bench.observations import draw_observations
from policy_client.bench.served import ServedPolicy, http_base, read_policy, websocket_base
from policy_models.spec import CameraSpec, GoalSpec, PolicySpec, VectorSpec
from policy_server.runtime.observation import ObservationReader

STATE = VectorSpec(("x", "y", "z"), ("m", "m", "m"), (-1.0, 0.0, 2.0), (1.0, 1.0, 3.0))
ACTION = VectorSpec(("fx",), ("N",))
TOP = CameraSpec("top", 24, 32)
SPECS = {
    "state goals": PolicySpec(ACTION, 4, 0.05, STATE, goal=GoalSpec("state", 2)),
    "cameras and words": PolicySpec(
        ACTION, 4, 0.05, STATE, (TOP, CameraSpec("wrist", 16, 16, "area")), GoalSpec("text", examples=("lift", "put"))
    ),
    "a goal image": PolicySpec(ACTION, 4, 0.05, cameras=(TOP,), goal=GoalSpec("image", camera=TOP)),
    "words without examples": PolicySpec(ACTION, 4, 0.05, STATE, goal=GoalSpec("text")),
    "no goal": PolicySpec(ACTION, 4, 0.05, VectorSpec(("x",), ("m",))),
}


def told(spec: PolicySpec) -> ServedPolicy:
    return ServedPolicy.of(json.loads(json.dumps({"name": "maze", "spec": asdict(spec)})))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_server_takes_what_is_drawn_and_nothing_of_it_is_zeros(spec: PolicySpec) -> None:
    observations = draw_observations(told(spec), 3, seed=4)
    for observation in observations:
        ObservationReader(spec).read(observation)
        assert all(
            np.ptp(value) > 0 for value in observation.values() if isinstance(value, np.ndarray) and value.size > 1
        )
    same = draw_observations(told(spec), 3, seed=4)
    np.testing.assert_equal(observations, same)


def test_states_lie_within_the_limits_of_the_spec() -> None:
    states = np.stack([o["state"] for o in draw_observations(told(SPECS["state goals"]), 100, seed=1)])
    assert (states >= np.float32(STATE.low)).all()
    assert (states <= np.float32(STATE.high)).all()


def test_observations_differ_from_each_other() -> None:
    first, second = draw_observations(told(SPECS["no goal"]), 2, seed=1)
    assert first["state"] != second["state"]


def test_a_file_without_a_spec_is_refused(tmp_path) -> None:
    (tmp_path / "policy.json").write_text('{"name": "maze"}')
    with pytest.raises(ValueError, match="holds no 'spec'"):
        read_policy(tmp_path / "policy.json")


def test_one_url_serves_all_doors() -> None:
    assert http_base("ws://robots.example:8000/x") == "http://robots.example:8000"
    assert websocket_base("https://robots.example") == "wss://robots.example"
    with pytest.raises(ValueError, match="expected one such as"):
        http_base("robots.example:8000")
