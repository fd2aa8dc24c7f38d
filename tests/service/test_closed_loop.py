"""The bundled policy drives the simulator: in process, through our client, and through openpi's, unmodified."""

import json
import os
import subprocess

import numpy as np
import pytest

from benchmarks.closed_loop import in_process as answers_in_process
from policy_client import PolicyClient
from policy_server.bundle import Bundle, load_bundle
from policy_sim.closed_loop import drive_tasks, ours
from policy_sim.episode import Episode
from tests.conftest import ZOO, Launch, RunningServer

TASKS, SEED, EXECUTE = 12, 5, 8


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(ZOO / "point-maze")


@pytest.fixture(scope="module")
def in_process(bundle: Bundle) -> list[Episode]:
    """What the policy does when nothing is between it and the simulator."""
    return drive_tasks(answers_in_process(bundle), tasks=TASKS, seed=SEED, execute=EXECUTE).episodes


@pytest.fixture
def zoo_server(launch: Launch) -> RunningServer:
    return launch(ZOO / "point-maze", "--engine", "onnx")


def test_the_bundled_policy_reaches_its_goals(in_process: list[Episode]) -> None:
    assert sum(episode.reached for episode in in_process) >= TASKS - 1


def test_our_client_drives_as_if_the_policy_were_in_process(
    zoo_server: RunningServer, in_process: list[Episode]
) -> None:
    with PolicyClient(zoo_server.websocket_url) as client:
        drives = drive_tasks(lambda task: ours(client, task), tasks=TASKS, seed=SEED, execute=EXECUTE)
    for got, wanted in zip(drives.episodes, in_process, strict=True):
        np.testing.assert_array_equal(got.states, wanted.states)


def test_the_unmodified_openpi_client_drives_as_if_the_policy_were_in_process(
    zoo_server: RunningServer, in_process: list[Episode]
) -> None:
    python = os.environ.get("OPENPI_PYTHON")
    if not python:
        pytest.skip("OPENPI_PYTHON names no environment with openpi-client; make test sets one up")
    arguments = ["--client", "openpi", "--tasks", str(TASKS), "--seed", str(SEED), "--execute", str(EXECUTE)]
    done = subprocess.run(
        [python, "-m", "policy_sim.closed_loop", zoo_server.websocket_url, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["success"] == [episode.reached for episode in in_process]
    assert result["steps"] == [episode.steps for episode in in_process]
