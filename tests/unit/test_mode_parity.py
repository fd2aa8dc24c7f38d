"""MoDE against the numbers of the public reference implementation."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from policy_models.diffusion.preconditioning import Denoiser
from policy_models.diffusion.samplers import SAMPLERS, run
from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels
from policy_models.mode.config import ImageConfig, TextConfig, TransformerConfig
from policy_models.mode.goals import Language, text_tower
from policy_models.mode.network import ModeDiT, branching, make_denoiser
from policy_models.mode.routing import Routes
from policy_models.mode.vision import make_encoder
from tests.unit.parity import ParityCase, drawn_input, parity_case

NETWORKS = ("mode_small", "mode_small_goalroute", "mode_small_shared")
SCHEDULE_NAMES = {"exp": "exponential", "karras": "karras"}
# An ulp more or less in x0 moves the first by 4e-4, since sigma_down is a small difference of large squares, and the
# others by 1e-3 and 3e-4, in three steps from 80 to 0.001. So CPUs that add up in another order differ there.
ILL_CONDITIONED = {"sample/exp5/dpm_2_ancestral": 5e-4, "sample/exp3/heun": 5e-4, "sample/exp3/dpm_2": 2e-4}


def _cases(pattern: str) -> list[tuple[str, str]]:
    found = [(name, key) for name in NETWORKS for key in parity_case(name).arrays if re.fullmatch(pattern, key)]
    assert found, f"no parity array matches {pattern}"
    return found


def _config(case: ParityCase) -> TransformerConfig:
    inner = case.about["inner"]
    shared = inner["use_shared_expert"]  # it counts as one of upstream's experts, and as one of its choices
    return TransformerConfig(
        action_width=inner["action_dim"],
        horizon=inner["action_seq_len"],
        width=inner["embed_dim"],
        layers=inner["n_layers"],
        heads=inner["n_heads"],
        goal_width=inner["goal_dim"],
        token_width=inner["obs_dim"],
        experts=inner["num_experts"] - shared,
        top_k=inner["top_k"] - shared,
        shared_expert=shared,
        noise_token=inner["use_noise_token_as_input"],
        goal_routing=inner["use_goal_in_routing"],
    )


def _weights(case: ParityCase) -> dict[str, torch.Tensor]:
    return {key: value for key, value in case.weights.items() if key != "inner_model.gripper_embed.weight"}


def _denoiser(case: ParityCase) -> Denoiser:
    denoiser = make_denoiser(_config(case)).eval()
    denoiser.load_state_dict(_weights(case))
    return denoiser


def _network(denoiser: Denoiser) -> ModeDiT:
    assert isinstance(denoiser.inner_model, ModeDiT)
    return denoiser.inner_model


def _sigmas(case: ParityCase, name: str) -> tuple[float, ...]:
    schedule, steps, lowest = re.fullmatch(r"([a-z]+)(\d+)(_min1)?", name).groups()
    levels = NoiseLevels(1.0 if lowest else case.about["sigma_min"], case.about["sigma_max"], 7.0)
    return SCHEDULES[SCHEDULE_NAMES[schedule]](int(steps), levels)


@pytest.mark.parametrize(("name", "key"), _cases(r"(net|net_uncond|denoised)/.*"))
@torch.no_grad()
def test_the_network_reproduces_every_output(name: str, key: str) -> None:
    case = parity_case(name)
    kind, level = key.split("/")
    goal, sigma, noisy = case.tensor("goal")[:, 0], torch.full((2,), float(level)), case.tensor("actions")
    if kind == "net_uncond":
        goal = torch.zeros_like(goal)
    denoiser = _denoiser(case)
    route = _network(denoiser).route(sigma, goal)
    if kind == "denoised":
        got = denoiser(noisy * float(level), sigma, case.tensor("img_tokens"), goal, route)
    else:
        got = _network(denoiser)(noisy, sigma, case.tensor("img_tokens"), goal, route)
    case.assert_close(got, key)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_noise_levels_can_be_mixed_in_one_batch(name: str) -> None:
    case = parity_case(name)
    denoiser, goal, sigma = _denoiser(case), case.tensor("goal")[:, 0], case.tensor("sigma_mixed")
    inputs = (case.tensor("actions"), sigma, case.tensor("img_tokens"), goal, _network(denoiser).route(sigma, goal))
    together = _network(denoiser)(*inputs)
    case.assert_close(together, "net_mixed")
    one_by_one = torch.cat([_network(denoiser)(*(value[i : i + 1] for value in inputs)) for i in range(2)])
    np.testing.assert_allclose(together, one_by_one, atol=5e-6)  # matrices of another height, rounded otherwise
    np.testing.assert_allclose(_network(branching(denoiser))(*inputs), together, atol=5e-6)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_block_reproduces_its_output(name: str) -> None:
    case = parity_case(name)
    network = _network(_denoiser(case))
    seen: list[torch.Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    goal, sigma = case.tensor("goal")[:, 0], torch.ones(2)
    network(case.tensor("actions"), sigma, case.tensor("img_tokens"), goal, network.route(sigma, goal))
    case.assert_close(torch.stack(seen), "block_out/1.0")


@pytest.mark.parametrize("name", ["mode_small", "mode_small_shared"])
@torch.no_grad()
def test_the_settled_routes_are_the_routers_own(name: str) -> None:
    case = parity_case(name)
    config = _config(case)
    weights = {f"denoiser.{key}": value.numpy() for key, value in _weights(case).items()}
    sigmas = case.arrays["sigmas/exp10"][:-1]

    settled = Routes(config, weights).of(sigmas)

    case.assert_close(settled, "route_probs")
    network, no_goal = _network(_denoiser(case)), torch.zeros(len(sigmas), config.goal_width)
    chosen = np.sort(case.arrays["route_ids"], axis=-1)
    np.testing.assert_array_equal(np.stack([*np.nonzero(settled)], -1)[:, 2].reshape(chosen.shape), chosen)
    np.testing.assert_allclose(settled, network.route(torch.from_numpy(sigmas), no_goal), atol=1e-6)


@torch.no_grad()
def test_a_goal_that_routes_is_part_of_the_route() -> None:
    case = parity_case("mode_small_goalroute")
    weights = {f"denoiser.{key}": value.numpy() for key, value in _weights(case).items()}
    goal = case.tensor("goal")[:1, 0]
    settled = Routes(_config(case), weights).of([10.0], goal[0].numpy())
    np.testing.assert_allclose(settled, _network(_denoiser(case)).route(torch.tensor([10.0]), goal), atol=1e-6)


@pytest.mark.parametrize(("name", "key"), _cases(r"sigmas/.*"))
def test_schedules(name: str, key: str) -> None:
    case = parity_case(name)
    case.assert_close(np.array(_sigmas(case, key.split("/")[1])), key)


@pytest.mark.parametrize(("name", "key"), _cases(r"(batch/)?sample/.*"))
@torch.no_grad()
def test_samplers_over_settled_routes_end_where_upstream_does(name: str, key: str) -> None:
    case = parity_case(name)
    batch, schedule, sampler = re.fullmatch(r"(batch/)?sample/(\w+)/(\w+)", key).groups()
    x = case.tensor("x0_batch" if batch else "x0")
    tape = list(case.arrays.get(f"noise/{schedule}/{sampler}", ()))
    # Upstream's own levels, to the last bit: from 80 to 0.001, second-order steps magnify an ulp a thousandfold.
    sigmas = [float(sigma) for sigma in case.arrays[f"sigmas/{schedule}"]]
    questions = SAMPLERS[sampler](x, sigmas, lambda: torch.from_numpy(tape.pop(0)) if tape else torch.zeros_like(x))
    xs, answers = [], []
    denoise = _settled_denoise(case, len(x))

    def answer(x: torch.Tensor, sigma: float) -> torch.Tensor:
        xs.append(x)
        answers.append(denoise(x, sigma))
        return answers[-1]

    atol = ILL_CONDITIONED.get(key, 2e-5)
    case.assert_close(run(questions, answer), key, atol=atol)
    for what, values in (("trace_x", xs), ("trace_denoised", answers)):
        trace = f"{batch or ''}{what}/{schedule}/{sampler}"
        if trace in case.arrays:
            # Where a step is denoised twice, upstream's traces hold the first time.
            got = torch.stack(_first_of_each_step(values, len(case.arrays[trace]), sampler))
            case.assert_close(got, trace, atol=atol)


def test_upstreams_cache_gave_what_ours_gives() -> None:
    case = parity_case("mode_small")
    np.testing.assert_allclose(case.arrays["cached_sample/exp10/ddim"], case.arrays["sample/exp10/ddim"], atol=1e-6)


@pytest.mark.parametrize(("encoder", "side", "seed"), [("resnet18", 112, 32), ("resnet50", 224, 31)])
@torch.no_grad()
def test_image_encoders(encoder: str, side: int, seed: int) -> None:
    case = parity_case(f"mode_film_{encoder}")
    network = make_encoder(ImageConfig(encoder), 512).eval()
    missing = network.load_state_dict(case.weights, strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
    goal = drawn_input("cond", (2, 1, 512) if encoder == "resnet50" else (2, 512), seed).reshape(2, 512)
    case.assert_close(network(drawn_input(f"img{side}", (2, 3, side, side), seed), goal), "out")


@torch.no_grad()
def test_the_text_tower() -> None:
    case = parity_case("mode_clip_text_small")
    language = Language(TextConfig(600, 64, 2, 1, 77, 32)).eval()
    language.load_state_dict(text_tower(case.weights))
    case.assert_close(language(case.tensor("tokens")), "out")


def _settled_denoise(case: ParityCase, batch: int):
    denoiser, config = _denoiser(case), _config(case)
    routes = Routes(config, {f"denoiser.{key}": value.numpy() for key, value in _weights(case).items()})
    goals = case.tensor("goal")[:batch, 0]

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        route = np.concatenate([routes.of([sigma], goal.numpy()) for goal in goals])
        return denoiser(
            x, torch.full((batch,), sigma), case.tensor("img_tokens")[:batch], goals, torch.from_numpy(route)
        )

    return denoise


def _first_of_each_step(values: Sequence[torch.Tensor], steps: int, sampler: str) -> Sequence[torch.Tensor]:
    return values[:: 2 if sampler == "heun" else 1][:steps]
