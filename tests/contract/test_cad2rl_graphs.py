"""CAD2RL's graph on every engine: the same answers, alone and in a batch."""

from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from policy_models.cad2rl.config import small
from policy_models.cad2rl.network import make_network
from policy_models.cad2rl.train import make_spec
from policy_models.directions import CollisionSpec
from policy_models.spec import SamplingOptions
from policy_server.bundle import FORMAT, Bundle, Manifest
from policy_server.engine.base import ENGINES, Engine
from policy_server.export.bundle import DEFAULT_TOLERANCE, write_bundle
from policy_server.golden import draw_observation
from policy_server.runtime.sampling import drive
from tests.contract.engines import make_engine, parameters

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["grid", "left-right-straight"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small network with random weights."""
    torch.manual_seed(0)
    config = replace(small(), head=request.param)
    network = make_network(config)
    network.train()
    with torch.no_grad():  # so that normalisation has statistics that it must apply
        network(torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8))
    directions = CollisionSpec("front", config.rows, config.columns, (90.0, 60.0), 6.0)
    manifest = Manifest(
        FORMAT,
        "avoider",
        "cad2rl",
        "1",
        "Random weights.",
        "Apache-2.0",
        make_spec(config, directions),
        asdict(config),
        dict(DEFAULT_TOLERANCE),
    )
    return write_bundle(tmp_path_factory.mktemp("cad2rl") / "avoider", manifest, weights=network.state_dict())


@pytest.fixture(params=parameters(["f32"]))
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[Engine]:
    engine = make_engine(request.param, bundle)
    yield engine
    engine.close()


def _images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_it_agrees_with_the_oracle(engine: Engine, bundle: Bundle, rows: int) -> None:
    oracle = ENGINES["torch"].make(bundle, 1)
    inputs = {"image": _images(rows)}
    got, wanted = engine.run("look", inputs), oracle.run("look", inputs)
    assert got.keys() == wanted.keys() == {"collision"}
    assert got["collision"].shape == (rows, 9, 13) and np.ptp(wanted["collision"]) > 0.01
    np.testing.assert_allclose(got["collision"], wanted["collision"], atol=TOLERANCE)


def test_sixteen_robots_in_a_batch_are_answered_as_each_alone(engine: Engine) -> None:
    images = _images(16)
    together = engine.run("look", {"image": images})["collision"]
    alone = [engine.run("look", {"image": images[i : i + 1]})["collision"] for i in range(16)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=TOLERANCE)


def test_a_whole_answer_agrees_with_the_oracle(engine: Engine, bundle: Bundle) -> None:
    program, oracle = bundle.new_program(), ENGINES["torch"].make(bundle, 1)
    observation = draw_observation(program.spec, np.random.default_rng(3))
    got, wanted = (
        drive(program.infer(observation, program.begin(), SamplingOptions(seed=0)), runner)
        for runner in (engine, oracle)
    )
    assert got.collision is not None and wanted.collision is not None
    np.testing.assert_allclose(got.collision, wanted.collision, atol=TOLERANCE)
    np.testing.assert_allclose(got.actions, wanted.actions, atol=10 * TOLERANCE)
