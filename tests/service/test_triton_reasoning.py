"""A policy that reasons in words, on a real Triton server, each of its graphs a model of its own."""

from pathlib import Path

import numpy as np

from policy_models.spec import SamplingOptions
from policy_server.bundle import Bundle
from policy_server.engine.base import ENGINES
from policy_server.golden import draw_observation
from policy_server.runtime.sampling import drive
from tests.conftest import Launch
from tests.service.robot import Robot
from tests.service.triton import export, running_triton


def test_words_and_chunks_are_those_of_this_process_and_what_cannot_be_had_there_is_refused(
    tiny_divla_bundle: Bundle, tmp_path: Path, launch: Launch
) -> None:
    bundle = tiny_divla_bundle
    export(bundle, tmp_path / "repository", apart=True)
    engine, program, draw = ENGINES["onnx"].make(bundle, 1), bundle.new_program(), np.random.default_rng(5)
    with running_triton(tmp_path / "repository") as triton:
        gateway = launch(bundle.path, "--engine", "triton", "--triton-url", triton.url)
        with Robot(gateway, "/v1/policies/tiny-divla/openpi") as robot:
            for seed in range(3):
                observation = draw_observation(bundle.spec, draw)
                outcome = drive(program.infer(observation, {}, SamplingOptions(seed)), engine)
                wire = {**observation.images, "state": observation.state, "prompt": observation.goal}
                reply = robot.ask(wire, options={"seed": seed, "reasoning": "fresh"})
                assert reply["reasoning"] == outcome.reasoning.text
                np.testing.assert_allclose(reply["actions"], outcome.actions, atol=1e-3)
            robot.send(wire, options={"reasoning": "none"})
            assert robot.refusal().code == "invalid_option"
