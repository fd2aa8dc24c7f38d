"""BESO against the numbers of the public reference implementation."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from policy_models.beso.family import make_graphs
from policy_models.beso.network import make_denoiser
from policy_models.beso.program import BesoProgram
from policy_models.diffusion.preconditioning import Denoiser
from policy_models.diffusion.samplers import SAMPLERS, run
from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels
from policy_models.normalizer import Normalizer, Statistics
from policy_models.program import GraphCall
from policy_models.spec import GoalSpec, Observation, PolicySpec, SamplerSpec, SamplingOptions, VectorSpec
from tests.unit.parity import ParityCase, parity_case

NETWORKS = ("beso_small", "beso_small_mlphead")
ROLLOUTS = ("beso_rollout_push_minmax", "beso_rollout_small_ddim_exp")
SCHEDULE_NAMES = {
    "exp": "exponential",
    "lin": "linear",
    "karras": "karras",
    "vp": "vp",
    "ve": "ve",
    "cosine": "cosine_beta",
    "iddpm": "iddpm",
    "polyexp": "polyexponential",
}


def _cases(pattern: str) -> list[tuple[str, str]]:
    found = [(name, key) for name in NETWORKS for key in parity_case(name).arrays if re.fullmatch(pattern, key)]
    assert found, f"no parity array matches {pattern}"
    return found


def _denoiser(case: ParityCase) -> Denoiser:
    denoiser = make_denoiser(case.config()).eval()
    denoiser.load_state_dict(case.weights)
    return denoiser


def _guided(case: ParityCase, guidance: float) -> Callable[[torch.Tensor, float], torch.Tensor]:
    denoiser, goal = _denoiser(case), case.tensor("goal")
    states = case.tensor(f"state/{case.config().window}")

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        sigmas = torch.full((len(x),), sigma)
        conditional = denoiser(x, sigmas, states, goal)
        goal_free = denoiser(x, sigmas, states, torch.zeros_like(goal))
        return goal_free + guidance * (conditional - goal_free)

    return denoise


def _sigmas(case: ParityCase, name: str) -> tuple[float, ...]:
    schedule, steps = re.fullmatch(r"([a-z]+)(\d+)", name).groups()
    rho = 1.0 if schedule == "polyexp" else 5.0
    levels = NoiseLevels(case.about["sigma_min"], case.about["sigma_max"], rho)
    return SCHEDULES[SCHEDULE_NAMES[schedule]](int(steps), levels)


@pytest.mark.parametrize(("name", "key"), _cases(r"(net|net_uncond|denoised)/.*"))
@torch.no_grad()
def test_the_network_reproduces_every_output(name: str, key: str) -> None:
    case = parity_case(name)
    kind, steps, sigma = key.split("/")
    goal = torch.zeros_like(case.tensor("goal")) if kind == "net_uncond" else case.tensor("goal")
    denoiser = _denoiser(case)
    network = denoiser if kind == "denoised" else denoiser.inner_model
    got = network(case.tensor(f"action/{steps}"), torch.full((2,), float(sigma)), case.tensor(f"state/{steps}"), goal)
    case.assert_close(got, key)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_samples_of_one_batch_may_have_different_noise_levels(name: str) -> None:
    case = parity_case(name)
    last = case.config().window
    inputs = (case.tensor(f"action/{last}"), case.tensor("sigma_mixed"), case.tensor(f"state/{last}"))
    case.assert_close(_denoiser(case)(*inputs, case.tensor("goal")), "denoised_mixed")


@pytest.mark.parametrize(("name", "key"), _cases(r"sigmas/.*"))
def test_every_schedule_reproduces_its_levels(name: str, key: str) -> None:
    case = parity_case(name)
    case.assert_close(_sigmas(case, key.removeprefix("sigmas/")), key)


@pytest.mark.parametrize(("name", "key"), _cases(r"(cfg[\d.]+/)?sample/.*"))
@torch.no_grad()
def test_every_sampler_reproduces_its_samples_and_its_path(name: str, key: str) -> None:
    case = parity_case(name)
    prefix, schedule, sampler = re.fullmatch(r"(cfg[\d.]+/)?sample/(\w+)/(\w+)", key).groups(default="")
    guidance = float(prefix[3:-1]) if prefix else 1.0
    tape = iter(case.arrays.get(f"noise/{schedule}/{sampler}", ()))
    denoise = _guided(case, guidance)
    questions, answers = [], []

    def watched(x: torch.Tensor, sigma: float) -> torch.Tensor:
        questions.append((x, sigma))
        answers.append(denoise(x, sigma))
        return answers[-1]

    sigmas = _sigmas(case, schedule)
    sampler_steps = SAMPLERS[sampler](case.tensor("x0"), sigmas, lambda: torch.from_numpy(next(tape)))
    case.assert_close(run(sampler_steps, watched), key)
    trace = f"{prefix}trace_x/{schedule}/{sampler}"
    if trace in case.arrays:
        # The reference notes what goes into each step, not into Heun's corrections within one.
        of_steps = [0] + [i for i in range(1, len(questions)) if sampler == "ddim" or i % 2 == 0]
        case.assert_close(torch.stack([questions[i][0] for i in of_steps]), trace)
        case.assert_close(torch.stack([answers[i] for i in of_steps]), trace.replace("trace_x", "trace_denoised"))


@pytest.mark.parametrize(("name", "key"), _cases(r"cfg[\d.]+/denoised"))
@torch.no_grad()
def test_guidance_mixes_the_conditional_and_the_goal_free_estimate(name: str, key: str) -> None:
    case = parity_case(name)
    x = case.tensor(f"action/{case.config().window}")
    case.assert_close(_guided(case, float(key[3:].split("/")[0]))(x, 0.3), key)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_the_agent_reproduces_seven_control_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = parity_case(name)
    # What upstream's block-push workspace does to goals, and its kitchen workspace does not.
    zeroed = (2, 5, 6, 7, 8, 9) if case.about["scaler"] == "MinMaxScaler" else ()
    config = case.config(zeroed_goal_dims=zeroed)
    program = BesoProgram(_rollout_spec(case), config, _rollout_normalizer(case))
    denoise = make_graphs(program.spec, config, case.weights)["denoise"]
    memory = program.begin()
    for step in range(7):
        noise = case.arrays[f"init_noise/{step}"]
        monkeypatch.setattr(np.random, "default_rng", lambda seed, noise=noise: _Taped(noise))
        goal = case.arrays["goal_raw"].reshape(config.goal_length, -1)
        dialogue = program.infer(Observation({}, case.arrays[f"obs/{step}"][0], goal), memory, SamplingOptions(0))
        outcome = _answer(dialogue, denoise.module)
        memory = outcome.memory
        np.testing.assert_allclose(
            outcome.actions, case.arrays[f"action/{step}"].reshape(1, -1), atol=2e-5, rtol=1e-4, err_msg=f"step {step}"
        )


def test_a_window_that_is_not_full_is_answered_as_if_the_padding_were_not_there() -> None:
    case = parity_case("beso_small")
    denoiser = _denoiser(case)
    goal, states, actions = case.tensor("goal"), case.tensor("state/3").clone(), case.tensor("action/3").clone()
    with torch.no_grad():
        short = denoiser(actions[:, :2], torch.full((2,), 0.3), states[:, :2], goal)
        states[:, 2], actions[:, 2] = 1e3, -1e3
        padded = denoiser(actions, torch.full((2,), 0.3), states, goal)
    torch.testing.assert_close(padded[:, :2], short, atol=1e-6, rtol=1e-6)


def test_a_chunk_of_one_is_upstreams_network() -> None:
    case = parity_case("beso_small")
    assert make_denoiser(replace(case.config(), horizon=1)).state_dict().keys() == case.weights.keys()


class _Taped:
    def __init__(self, noise: np.ndarray) -> None:
        self.noise = noise

    def standard_normal(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return self.noise.reshape(shape)


@torch.no_grad()
def _answer(dialogue, module):
    answer = None
    while True:
        try:
            call: GraphCall = dialogue.send(answer)
        except StopIteration as finished:
            return finished.value
        answer = {"denoised": module(*(torch.from_numpy(value) for value in call.inputs.values())).numpy()}


def _rollout_spec(case: ParityCase) -> PolicySpec:
    def unnamed(width: int) -> VectorSpec:
        return VectorSpec(tuple(f"d{i}" for i in range(width)), ("",) * width)

    config, about = case.config(), case.about
    return PolicySpec(
        action=unnamed(config.action_width),
        state=unnamed(config.state_width),
        goal=GoalSpec("state", config.goal_length),
        horizon=1,
        step_s=0.1,
        window=config.window,
        sampler=SamplerSpec(
            about["sampler"],
            about["schedule"],
            about["n"],
            about["sigma_min"],
            about["sigma_max"],
            5.0,
            about["cond_lambda"],
        ),
    )


def _rollout_normalizer(case: ParityCase) -> Normalizer:
    scaling = "minmax" if case.about["scaler"] == "MinMaxScaler" else "zscore"
    return Normalizer(Statistics.of(case.arrays["x_data"]), Statistics.of(case.arrays["y_data"]), "zscore", scaling)
