"""What the server needs of BESO: its program, and its graphs when something is exported or run in torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from policy_models.beso.config import BesoConfig
from policy_models.beso.program import BesoProgram
from policy_models.diffusion.samplers import SAMPLERS
from policy_models.diffusion.schedules import SCHEDULES
from policy_models.program import Assets, Graph
from policy_models.spec import PolicySpec

if TYPE_CHECKING:
    from torch import Tensor

Config = BesoConfig


def make_program(spec: PolicySpec, config: BesoConfig, assets: Assets) -> BesoProgram:
    """Return the program of one bundle; raises ValueError if the parts do not fit each other."""
    normalizer = assets.normalizer
    if normalizer is None or spec.state is None or spec.sampler is None:
        raise ValueError("a BESO bundle needs a state, a sampler and a normalizer")
    for what, got, wanted in (
        ("state width", spec.state.width, config.state_width),
        ("action width", spec.action.width, config.action_width),
        ("horizon", spec.horizon, config.horizon),
        ("window", spec.window, config.window),
        ("normalizer's state width", len(normalizer.state.mean), config.state_width),
        ("normalizer's action width", len(normalizer.action.mean), config.action_width),
    ):
        if got != wanted:
            raise ValueError(f"{what} is {got}, but the network has {wanted}")
    if spec.sampler.sampler not in SAMPLERS or spec.sampler.schedule not in SCHEDULES:
        raise ValueError(
            f"sampler {spec.sampler.sampler!r} with schedule {spec.sampler.schedule!r}; there are the samplers "
            f"{', '.join(SAMPLERS)} and the schedules {', '.join(SCHEDULES)}"
        )
    return BesoProgram(spec, config, normalizer)


def make_graphs(spec: PolicySpec, config: BesoConfig, weights: "Mapping[str, Tensor]") -> dict[str, Graph]:
    """Return the graphs of one bundle in torch, with example inputs of batch 2; weights must fit key by key."""
    import torch

    from policy_models.beso.network import fused, make_denoiser

    denoise = make_denoiser(config)
    denoise.load_state_dict(weights)
    denoise.eval()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> "Tensor":
        return torch.randn(*shape, generator=generator)

    return {
        "denoise": Graph(
            module=denoise,
            exported=fused(denoise),
            inputs={
                "noisy": draw(2, config.action_tokens, config.action_width),
                "sigma": draw(2).abs() + 0.1,
                "states": draw(2, config.window, config.state_width),
                "goal": draw(2, config.goal_length, config.state_width),
            },
            outputs=("denoised",),
            differentiated=fused(denoise),
        )
    }
