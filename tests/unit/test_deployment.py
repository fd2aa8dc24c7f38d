"""Images and services fit each other, the command line and the tree. hadolint reads the Dockerfile in `make check`."""

import json
import re

import pytest
import typer
import yaml

from policy_server.cli import app
from tests.conftest import REPOSITORY

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
SERVICES = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]
STAGES = re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_a_stage_without_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["build"]["target"] in STAGES
    assert service["cap_drop"] == ["ALL"]
    assert service["read_only"]
    assert all(volume.endswith(":ro") for volume in service["volumes"])
    assert set(service.get("depends_on", {})) <= set(SERVICES)


def test_triton_is_reached_through_the_gateway_alone() -> None:
    assert "ports" not in SERVICES["triton"]
    assert SERVICES["gateway"]["ports"] == ["8000:8000"]


def test_what_is_copied_is_there_and_not_left_out() -> None:
    let_in = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (REPOSITORY / source).exists()
            assert f"!{source.partition('/')[0]}" in let_in


def test_images_run_commands_that_there_are() -> None:
    serve = typer.main.get_command(app).commands["serve"]
    options = {option for parameter in serve.params for option in parameter.opts}
    commands = [json.loads(found) for found in re.findall(r"^CMD (\[\"serve.+\])$", DOCKERFILE, re.MULTILINE)]
    assert len(commands) == 3
    for words in commands:
        assert {word for word in words if word.startswith("--")} <= options
    extras = set(re.findall(r"\[([a-z,-]+)\]\"", DOCKERFILE))
    stated = (REPOSITORY / "pyproject.toml").read_text()
    for extra in ",".join(extras).split(","):
        assert re.search(rf"^{extra} = \[", stated, re.MULTILINE)
