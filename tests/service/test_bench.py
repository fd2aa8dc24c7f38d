"""`policy-bench` against a server that runs for real."""

import httpx
import pytest

from policy_client.bench.cli import main
from policy_client.bench.result import load_result
from tests.conftest import RunningServer

LOAD = ("--robots", "2", "--rate", "10", "--seconds", "0.5")


@pytest.mark.parametrize(("door", "policy"), [("openpi", "camera"), ("stream", "camera"), ("http", "tiny-step")])
def test_every_door_is_tested_and_reported(server: RunningServer, door: str, policy: str, tmp_path) -> None:
    files = ("--json", str(tmp_path / "result.json"), "--html", str(tmp_path / "result.html"))
    assert main(["run", server.url, "--policy", policy, "--door", door, *LOAD, "--processes", "2", *files]) == 0
    result = load_result(tmp_path / "result.json")
    assert result.asked == result.answered == 10
    assert result.failures == {}
    assert result.test.processes == 2
    assert result.test.engine == "onnx"
    assert {"inference", "outside"} <= result.stages.keys()
    assert "<svg" in (tmp_path / "result.html").read_text()


def test_a_gate_that_cannot_be_met_fails_the_job(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", server.url, *LOAD, "--max-p99", "0.001"]) == 1
    assert "GATE: p99 is" in capsys.readouterr().err


def test_observations_that_the_server_refuses_end_the_test_with_its_words(
    server: RunningServer, http: httpx.Client, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "policy.json"
    spec.write_text(http.get("/v1/policies/tiny").text)
    assert main(["run", server.url, "--spec", str(spec), "--policy", "camera", *LOAD]) == 2
    assert "unexpected_input" in capsys.readouterr().err


def test_a_policy_that_is_not_served_is_named(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", server.url, "--policy", "none"]) == 2
    assert "none" in capsys.readouterr().err
