"""The whole of DiVLA, from pixels and token ids to actions, against what upstream computed in bfloat16."""

from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from transformers import Qwen2VLForConditionalGeneration

from policy_models.divla.config import DivlaConfig, EyesConfig, LanguageConfig, ScaleDpConfig
from policy_models.divla.fusion import Fusion
from policy_models.divla.prompt import SpecialTokens
from policy_models.divla.reason import Reasoned, reason
from policy_models.divla.scale_dp import ScaleDp
from policy_models.divla.vlm import load_weights, make_vlm
from tests.unit.parity import ParityCase, parity_case

HEAD = ScaleDpConfig(layers=2, width=64, heads=4)
CONFIG = DivlaConfig(
    HEAD,
    state_width=6,
    action_width=5,
    horizon=8,
    eyes=EyesConfig(layers=2, width=64, heads=4),
    language=LanguageConfig(300, 64, 2, 4, 2, 128, rope_sections=(2, 3, 3)),
)
END, PAD = 299, 298  # tokens that do not occur
# Every number was equal to the last bit where this was written. A CPU that adds up in another order rounds otherwise,
# and ten steps magnify that; a condition without its reasoning is off by half of 1.
ATOL = {"hidden": 6e-2, "action_hidden": 5e-2, "action": 2e-1}


@pytest.fixture(scope="module")
def case() -> ParityCase:
    return parity_case("divla_tiny_e2e")


@cache
def _reasoned() -> Reasoned:
    case = parity_case("divla_tiny_e2e")
    config = case.about["config"]
    vlm = make_vlm(CONFIG, SpecialTokens(PAD, -1, END, config["vision_start_token_id"], -1, config["image_token_id"]))
    load_weights(vlm, _named_as_in_transformers_5(_weights(case)))
    _turn_in_bfloat16(vlm)
    tokens = case.tensor("input_ids")
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == config["image_token_id"]).int(),
        "pixel_values": case.tensor("pixel_values").bfloat16(),
        "image_grid_thw": case.tensor("image_grid_thw"),
    }
    return reason(vlm.eval(), inputs, end=END, pad=PAD, most=case.about["max_new_tokens"])


def _turn_in_bfloat16(vlm: Qwen2VLForConditionalGeneration) -> None:
    """Upstream casts all of the model, the frequencies of rotary positions too; transformers 5 has kept these apart."""
    vlm.model.language_model.rotary_emb.bfloat16()
    rotary = vlm.model.visual.rotary_pos_emb.bfloat16()

    def forward(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None].bfloat16() * rotary.inv_freq
        return rotary.recomposition_frequencies(angles.cos()), rotary.recomposition_frequencies(angles.sin())

    rotary.forward = forward


def _weights(case: ParityCase) -> dict[str, torch.Tensor]:
    weights = {key: weight.bfloat16() for key, weight in case.all_weights.items()}
    # They are one tensor, which was drawn anew under its second name.
    return weights | {"model.embed_tokens.weight": weights["lm_head.weight"]}


def _named_as_in_transformers_5(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    towers = {"visual.": "model.visual.", "model.": "model.language_model."}
    return {
        key.replace(old, new, 1): weight
        for key, weight in weights.items()
        for old, new in towers.items()
        if key.startswith(old)
    }


def _part(weights: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {key: weight for key, weight in weights.items() if key.startswith(prefixes)}


def test_the_reasoning_is_upstreams_word_for_word(case: ParityCase) -> None:
    prompt = case.arrays["input_ids"].shape[1]
    assert _reasoned().tokens.tolist() == case.arrays["output_ids"][0, prompt:].tolist()
    assert " ".join(map(str, _reasoned().tokens.tolist())) == case.about["text"]


def test_the_hidden_states_are_upstreams(case: ParityCase) -> None:
    got = torch.cat((_reasoned().prefix, _reasoned().reasoning)).float()
    assert len(_reasoned().prefix) == case.arrays["input_ids"].shape[1]
    np.testing.assert_allclose(got, case.arrays["hidden"][0], atol=ATOL["hidden"])


def test_the_conditioning_is_upstreams(case: ParityCase) -> None:
    np.testing.assert_allclose(_condition(case).float(), case.arrays["action_hidden"][0], atol=ATOL["action_hidden"])


def test_the_actions_are_upstreams(case: ParityCase) -> None:
    head = ScaleDp(HEAD, condition_width=64, state_width=6, action_width=5, horizon=8).bfloat16()
    own = _part(_weights(case), "policy_head.")
    head.load_state_dict({key.removeprefix("policy_head."): weight for key, weight in own.items()})
    scheduler = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(10)
    actions, state, condition = case.tensor("init_noise").bfloat16(), case.tensor("state").bfloat16(), _condition(case)
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            eps = head(actions, timestep[None], condition, state)
            actions = scheduler.step(eps, timestep, actions).prev_sample
    np.testing.assert_allclose(actions.float(), case.arrays["action"], atol=ATOL["action"])


@torch.inference_mode()
def _condition(case: ParityCase) -> torch.Tensor:
    fusion = Fusion(64).bfloat16()
    fusion.load_state_dict(_part(_weights(case), "input_action_proj.", "reasoning_action_proj.", "reasoning_film."))
    prefix, reasoning = _reasoned().prefix[None], _reasoned().reasoning[None]
    p, mean = fusion.prefix_part(prefix, torch.ones(prefix.shape[:2]))
    return fusion.inject(p, mean, fusion.reasoning_part(reasoning, torch.ones(reasoning.shape[:2])))
