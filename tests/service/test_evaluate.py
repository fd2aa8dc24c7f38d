"""`policy-server evaluate` against real servers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from policy_client import ConnectionLost, PolicyClient
from policy_server.cli import app
from policy_sim.episode import held_out_tasks
from policy_sim.evaluate import evaluate
from policy_sim.evaluation import Evaluation
from policy_sim.simulators import SIMULATORS
from policy_sim.trial import TrialResult
from tests.conftest import ZOO, RunningServer

MAZE = SIMULATORS["point-maze"]


class BreaksOff:
    """A simulator whose fourth episode loses its server."""

    def run(self, client: PolicyClient, seed: int) -> TrialResult:
        if seed == 3:
            raise ConnectionLost("the server is gone")
        client.infer({"state": np.zeros(4), "goal": np.zeros(4)})
        return TrialResult(seed, "goal", True, {})

    def close(self) -> None:
        pass


def test_parallel_episodes_are_those_of_their_seeds(server: RunningServer) -> None:
    evaluation = Evaluation("tiny", "1", "point-maze", planned=3, first_seed=5, parallel=2)
    evaluate(evaluation, MAZE, server.websocket_url)
    assert evaluation.failure is None
    assert [result.seed for result in evaluation.results] == [5, 6, 7]
    for result in evaluation.results:
        assert result.path is not None and result.measures["chunk_wait_ms"] > 0
        np.testing.assert_allclose(result.path[0], held_out_tasks(1, result.seed)[0].start, atol=1e-6)


def test_an_episode_that_breaks_off_ends_the_evaluation_and_costs_no_result(server: RunningServer) -> None:
    evaluation = Evaluation("tiny", "1", "point-maze", planned=50, first_seed=0, parallel=1)
    evaluate(evaluation, replace(MAZE, new_trial=BreaksOff), server.websocket_url)
    assert [result.seed for result in evaluation.results] == [0, 1, 2]
    assert evaluation.failure == "the episode with seed 3 broke off: ConnectionLost: the server is gone"


def test_the_command_starts_a_server_and_writes_what_it_found(tmp_path: Path) -> None:
    found, page = tmp_path / "found.json", tmp_path / "found.html"
    options = ["--episodes", "2", "--parallel", "2", "--json", str(found), "--html", str(page)]
    done = CliRunner().invoke(app, ["evaluate", str(ZOO), "--policy", "point-maze", *options])
    assert done.exit_code == 0, done.output
    summary = json.loads(found.read_text())
    assert (summary["episodes"], summary["success"]["rate"], summary["failure"]) == (2, 1.0, None)
    assert "point-maze 1 in point-maze" in page.read_text()
