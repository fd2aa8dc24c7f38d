"""One suite for every engine: they answer alike, whatever runs inside."""

from collections.abc import Iterator

import numpy as np
import pytest

from policy_models.spec import SamplingOptions
from policy_server.bundle import Bundle
from policy_server.engine.base import ENGINES, Engine
from policy_server.golden import draw_observation
from policy_server.runtime.sampling import drive
from tests.contract.engines import make_engine, parameters

# Relative to actions in [-1, 1]. The bar for float32 is 1e-4; bfloat16 has 8 bits of mantissa.
TOLERANCE = {"f32": 1e-5, "bf16": 3e-2}


# int8 weights are a variant of some bundles; test_mode_graphs.py has one.
@pytest.fixture(params=parameters(TOLERANCE))
def engine(request: pytest.FixtureRequest, tiny_bundle: Bundle) -> Iterator[Engine]:
    engine = make_engine(request.param, tiny_bundle)
    assert engine.name == request.param
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def oracle(tiny_bundle: Bundle) -> Engine:
    return ENGINES["torch"].make(tiny_bundle, 1)


def _inputs(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "noisy": draw.standard_normal((rows, 4, 2), dtype=np.float32),
        "sigma": draw.uniform(0.05, 1.0, rows).astype(np.float32),
        "states": draw.standard_normal((rows, 1, 4), dtype=np.float32),
        "goal": draw.standard_normal((rows, 1, 4), dtype=np.float32),
    }


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17])
def test_it_agrees_with_the_oracle_at_every_batch_size(engine: Engine, oracle: Engine, rows: int) -> None:
    inputs = _inputs(rows)
    got, wanted = engine.run("denoise", inputs)["denoised"], oracle.run("denoise", inputs)["denoised"]
    assert got.shape == wanted.shape == (rows, 4, 2)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE[engine.precision])


def test_a_row_is_answered_the_same_whatever_shares_its_batch(engine: Engine) -> None:
    inputs = _inputs(8)
    together = engine.run("denoise", inputs)["denoised"]
    alone = [engine.run("denoise", {k: v[i : i + 1] for k, v in inputs.items()})["denoised"] for i in range(8)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=TOLERANCE[engine.precision])


def test_it_answers_the_same_question_bit_for_bit(engine: Engine) -> None:
    inputs = _inputs(2)
    first = engine.run("denoise", inputs)["denoised"]
    np.testing.assert_array_equal(engine.run("denoise", inputs)["denoised"], first)


def test_an_answer_is_not_overwritten_by_the_next_one(engine: Engine) -> None:
    first = engine.run("denoise", _inputs(2, seed=1))["denoised"]
    kept = first.copy()
    engine.run("denoise", _inputs(2, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_it_leaves_its_inputs_alone(engine: Engine) -> None:
    inputs = _inputs(2)
    copies = {name: value.copy() for name, value in inputs.items()}
    engine.run("denoise", inputs)
    for name, value in inputs.items():
        np.testing.assert_array_equal(value, copies[name])


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "euler_ancestral", "lms"])
def test_a_whole_chunk_agrees_with_the_oracle(
    engine: Engine, oracle: Engine, tiny_bundle: Bundle, sampler: str, guidance: float
) -> None:
    program = tiny_bundle.new_program()
    observation = draw_observation(program.spec, np.random.default_rng(3))
    options = SamplingOptions(seed=5, steps=5, sampler=sampler, guidance=guidance)
    got = drive(program.infer(observation, program.begin(), options), engine).actions
    wanted = drive(program.infer(observation, program.begin(), options), oracle).actions
    np.testing.assert_allclose(got, wanted, atol=10 * TOLERANCE[engine.precision])
