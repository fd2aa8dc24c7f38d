"""Evaluations: which simulator, what the episodes say, and what the report shows of them."""

import re
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import policy_sim.evaluate
from policy_models.spec import CameraSpec, GoalSpec, PolicySpec, VectorSpec
from policy_server.bundle import load_bundle
from policy_server.cli import app
from policy_sim.evaluate import evaluate
from policy_sim.evaluation import Evaluation
from policy_sim.evaluation_report import report
from policy_sim.simulators import SIMULATORS, simulator_for
from policy_sim.success import bootstrap, wilson
from policy_sim.trial import TrialResult
from tests.conftest import ZOO, free_port

RNG = np.random.default_rng(11)


def evaluated(count: int, *, planned: int | None = None) -> Evaluation:
    results = [
        TrialResult(
            seed,
            f"task-{seed % 2}",
            bool(RNG.random() < 0.7),
            {"time_s": float(RNG.exponential(3.0))},
            RNG.normal(size=(20, 2)),
        )
        for seed in range(count)
    ]
    return Evaluation("maze <1>", "2", "point-maze", planned or count, 0, 4, results)


@pytest.mark.parametrize("name", ["point-maze", "point-maze-step", "meta-world"])
def test_a_bundled_policy_finds_its_simulator(name: str) -> None:
    assert simulator_for(load_bundle(ZOO / name).manifest.spec).name == name.removesuffix("-step")


def test_a_policy_that_looks_at_more_than_there_is_does_not_fit() -> None:
    hand = VectorSpec(("vx", "vy", "grip"), ("m/s", "m/s", ""))
    goal = GoalSpec("text", examples=("sort",))
    spec = PolicySpec(action=hand, horizon=8, step_s=0.1, cameras=(CameraSpec("top", 32, 32),), goal=goal)
    assert simulator_for(spec).name == "sorting"
    with pytest.raises(ValueError, match="wants cameras wrist, the robot has top"):
        simulator_for(replace(spec, cameras=(CameraSpec("wrist", 32, 32),)), "sorting")


def test_an_unknown_simulator_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no simulator 'moon'; there are point-maze, meta-world, sorting, flights"):
        simulator_for(load_bundle(ZOO / "point-maze").manifest.spec, "moon")


def test_the_command_says_why_no_simulator_fits() -> None:
    done = CliRunner().invoke(app, ["evaluate", str(ZOO / "hold")])
    assert done.exit_code == 2
    assert "point-maze: the policy gives joint_0, joint_1" in done.stderr
    assert "the robot takes force_x, force_y" in done.stderr


def test_the_command_asks_which_policy_of_a_folder() -> None:
    done = CliRunner().invoke(app, ["evaluate", str(ZOO)])
    assert done.exit_code == 2
    assert "name one with --policy: hold, meta-world, point-maze" in done.stderr


def test_the_bootstrap_interval_of_a_mean_holds_the_truth_about_95_times_in_100() -> None:
    hits = 0
    for seed in range(100):
        low, high = bootstrap(np.random.default_rng(seed).normal(5.0, 2.0, size=60), resamples=300)
        hits += low <= 5.0 <= high
    assert 0.89 <= hits / 100 <= 0.99


def test_a_summary_counts_each_measure_over_the_episodes_that_have_it() -> None:
    evaluation = evaluated(30)
    evaluation.results[0] = replace(evaluation.results[0], measures={})
    summary = evaluation.summary()
    successes = sum(result.success for result in evaluation.results)
    assert summary["success"]["interval_95"] == pytest.approx(wilson(successes, 30), abs=1e-4)
    assert (summary["measures"]["time_s"]["of"], summary["success"]["of"]) == (29, 30)
    assert {name: rate["of"] for name, rate in summary["by_group"].items()} == {"task-0": 15, "task-1": 15}


def test_a_truth_value_that_never_came_true_has_an_interval_with_a_width() -> None:
    evaluation = Evaluation("maze", "1", "point-maze", 6, 0, 1)
    evaluation.results = [TrialResult(seed, "goal", True, {"fell": False}) for seed in range(6)]
    assert evaluation.summary()["measures"]["fell"]["interval_95"] == pytest.approx(wilson(0, 6), abs=1e-4)
    assert "fell" in report(evaluation)


def test_the_report_stands_alone_and_escapes_names() -> None:
    evaluation = evaluated(12)
    page = report(evaluation)
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import', page.replace("xlink:href", "href"))
    assert "maze &lt;1&gt;" in page and "maze <1>" not in page
    assert page.count("<svg") == 4  # as it went, by task, a measure, paths
    assert not re.findall(r"#0[1-9a-f]0[1-9a-f]0[1-9a-f]", page), "a stand-in colour is left"
    assert re.findall(r"<td>(\d+)</td><td>task-\d</td>", page) == [
        str(r.seed) for r in evaluation.results if not r.success
    ]


def test_the_report_of_an_evaluation_that_broke_off_shows_why_and_what_there_is() -> None:
    evaluation = evaluated(5, planned=9)
    evaluation.failure = "the episode with seed 5 broke off"
    page = report(evaluation)
    assert "5 of 9 episodes" in page and "the episode with seed 5 broke off" in page


def test_the_report_of_no_episodes_is_a_page_too() -> None:
    evaluation = Evaluation("maze", "1", "point-maze", 3, 0, 2, failure="nobody answered")
    assert "nobody answered" in report(evaluation)
    assert evaluation.summary()["success"] is None


def test_a_server_that_is_not_there_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_sim.evaluate, "_CONNECT_S", 0.2)
    evaluation = Evaluation("maze", "1", "point-maze", 4, 0, 2)
    url = f"ws://127.0.0.1:{free_port()}"
    evaluate(evaluation, SIMULATORS["point-maze"], url)
    assert evaluation.results == []
    assert evaluation.failure is not None and evaluation.failure.startswith(f"{url} did not answer: ConnectFailed")
