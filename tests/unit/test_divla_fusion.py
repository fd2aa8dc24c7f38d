"""What DiVLA's head is told, against the public reference implementation."""

import numpy as np
import torch
from torch import Tensor

from policy_models.divla.fusion import Fusion
from tests.unit.parity import ParityCase, parity_case


def _fusion() -> tuple[ParityCase, Fusion]:
    case = parity_case("divla_fusion")
    fusion = Fusion(case.about["dim"]).eval()
    fusion.load_state_dict(case.weights)
    return case, fusion


def _masks(case: ParityCase) -> tuple[Tensor, Tensor]:
    """Which hidden states are the prompt's, and which the reasoning's."""
    prompt = case.tensor("labels") == -100
    return prompt & (case.tensor("input_ids") != 151643), ~prompt


@torch.no_grad()
def test_fusion_reproduces_what_the_head_is_told() -> None:
    case, fusion = _fusion()
    told = fusion(case.tensor("hidden"), *_masks(case))
    case.assert_close(told[:, None], "film_forward")


@torch.no_grad()
def test_the_parts_of_fusion_give_the_whole() -> None:
    case, fusion = _fusion()
    hidden = case.tensor("hidden")
    # A server has the prompt's and the reasoning's hidden states apart, and the latter padded.
    prefix, _ = _masks(case)
    p, mean = fusion.prefix_part(hidden[:, :9], prefix[:, :9])
    reasoning = torch.full((2, 7, hidden.shape[-1]), torch.nan)
    reasoning[:, :4] = hidden[:, 9:]
    r = fusion.reasoning_part(reasoning, (torch.arange(7) < 4).expand(2, 7))
    case.assert_close(fusion.inject(p, mean, r)[:, None], "film_forward")


@torch.no_grad()
def test_without_reasoning_the_head_is_told_the_prompt_alone() -> None:
    case, fusion = _fusion()
    hidden, (prefix, reasoning) = case.tensor("hidden"), _masks(case)
    p, mean = fusion.prefix_part(hidden, prefix)
    torch.testing.assert_close(fusion.inject(p, mean, None), p + mean, rtol=0, atol=0)
    reasoning[0] = False
    told = fusion(hidden, prefix, reasoning)
    torch.testing.assert_close(told[0], (p + mean)[0])
    np.testing.assert_allclose(told[1], case.arrays["film_forward"][1, 0], atol=2e-5, rtol=1e-4)
    assert (told[0] - torch.from_numpy(case.arrays["film_forward"][0, 0])).abs().max() > 0.01


@torch.no_grad()
def test_fresh_fusion_is_not_moved_by_reasoning() -> None:
    fusion = Fusion(8)
    p, mean, r = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fusion.inject(p, mean, r), fusion.inject(p, mean, None))
