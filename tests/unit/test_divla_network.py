"""A DiVLA policy in torch: the same whether its weights were drawn first or not."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from policy_models.divla.config import DivlaConfig
from policy_models.divla.graphs import See
from policy_models.divla.network import DivlaNetworks, ReadAndFuse
from tests.unit.divla_files import SMALL, SMALL_UNET, small_parts, small_vlm

HEADS = pytest.mark.parametrize("config", [SMALL, SMALL_UNET], ids=["scale_dp", "unet"])


def weights(config: DivlaConfig) -> dict[str, Tensor]:
    head, fusion = small_parts(config)
    parts = {"vlm": small_vlm(), "head": head, "fusion": fusion}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


@torch.no_grad()
def answers(networks: DivlaNetworks, config: DivlaConfig) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 1, 56, 28, 3), generator=generator, dtype=torch.uint8)
    tokens, places = torch.randint(0, 160, (2, 8), generator=generator), torch.full((2, 8), -1)
    places[:, 2:4] = torch.arange(2)
    seen = See(networks.vlm, config.eyes, 56, 28)(images)
    positions = torch.arange(8).expand(2, 3, -1)
    logits, cache, p, mean = ReadAndFuse(networks)(tokens, places, seen, positions, torch.ones_like(tokens))
    noisy, state = torch.randn(2, 8, 5, generator=generator), torch.randn(2, 6, generator=generator)
    denoised = networks.denoiser(noisy, torch.tensor([0.2, 30.0]), p + mean, state)
    return {"seen": seen, "logits": logits, "cache": cache, "context": p + mean, "denoised": denoised}


@HEADS
def test_networks_made_of_weights_are_those_that_take_them_later(config: DivlaConfig) -> None:
    given = weights(config)
    ordinary = DivlaNetworks(config)
    ordinary.load(given)
    made = DivlaNetworks.of(config, given)
    for (name, tensor), (_, wanted) in zip(
        (*made.named_parameters(), *made.named_buffers()),
        (*ordinary.named_parameters(), *ordinary.named_buffers()),
        strict=True,
    ):
        assert not tensor.is_meta, name
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, msg=name)
    wanted = answers(ordinary.eval(), config)
    for name, answer in answers(made.eval(), config).items():
        torch.testing.assert_close(answer, wanted[name], rtol=0, atol=0, msg=name)


@HEADS
def test_no_weights_are_drawn_or_copied_where_there_are_some(config: DivlaConfig) -> None:
    given, before = weights(config), torch.get_rng_state()
    made = DivlaNetworks.of(config, given)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name for name, t in made.named_parameters() if t.data_ptr() != given[name].data_ptr()} == set()


@HEADS
def test_networks_are_not_made_of_fewer_weights(config: DivlaConfig) -> None:
    for name in ("vlm.model.language_model.norm.weight", "fusion.reasoning_film.shift_fc.bias"):
        given = weights(config)
        del given[name]
        with pytest.raises((RuntimeError, ValueError), match=name.partition(".")[2]):
            DivlaNetworks.of(config, given)
