"""What the service tests share: one HTTP client, a policy that takes its time, and the last question of many tests."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import httpx
import numpy as np
import pytest

from policy_models.beso.network import make_denoiser
from policy_server.bundle import Bundle, load_bundle
from policy_server.export.bundle import write_bundle
from tests.conftest import ZOO, RunningServer, launched
from tests.service.robot import CAMERA, PATIENCE_S, TINY, Robot, in_json
from tests.service.triton import POLICIES, RunningTriton, export, running_triton


@pytest.fixture(scope="session")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of the session's server."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture(scope="session")
def assert_still_serving(server: RunningServer, http: httpx.Client) -> Callable[[], None]:
    """Call this after an attempt to disturb the server: another robot gets the very chunk it always got."""

    def chunk() -> np.ndarray:
        with Robot(server) as robot:
            return robot.actions(TINY, seed=7)

    wanted = chunk()

    def check() -> None:
        np.testing.assert_array_equal(chunk(), wanted)
        response = http.post("/v1/policies/camera/act", json={"observation": in_json(CAMERA)})
        assert response.json()["actions"] == [[0.5, -0.25]] * 4
        assert http.get("/readyz").status_code == 200

    return check


@pytest.fixture(scope="session")
def slow_bundle(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Like tiny, but so wide that `SLOWLY` takes it half a second."""
    config = replace(tiny_bundle.config, width=384, layers=2)
    manifest = replace(tiny_bundle.manifest, name="slow", config=asdict(config), files={})
    return write_bundle(
        tmp_path_factory.mktemp("bundles") / "slow",
        manifest,
        normalizer=tiny_bundle.new_program().normalizer,
        weights=make_denoiser(config).state_dict(),
        gradients=False,
    )


@pytest.fixture(scope="session")
def triton(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle, tiny_step_bundle: Bundle
) -> Iterator[RunningTriton]:
    """A Triton server whose repository holds the zoo and two small policies."""
    repository = tmp_path_factory.mktemp("triton") / "repository"
    for name in POLICIES:
        export(load_bundle(ZOO / name), repository)
    export(tiny_bundle, repository)
    export(tiny_step_bundle, repository, apart=True)
    with running_triton(repository) as running:
        for model in ("tiny-step@denoise", "tiny-step", "tiny", "meta-world"):  # the others are the gateway's to load
            running.client.load_model(model)
        yield running


@pytest.fixture(scope="session")
def gateway(triton: RunningTriton, tiny_bundle: Bundle, tiny_step_bundle: Bundle) -> Iterator[RunningServer]:
    """A gateway on it."""
    bundles = (tiny_bundle.path, tiny_step_bundle.path, ZOO)
    with launched(*bundles, "--engine", "triton", "--triton-url", triton.url) as running:
        yield running
