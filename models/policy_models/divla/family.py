"""What the server needs of DiVLA: its program, and its graphs when something is exported or run in torch."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from policy_models.diffusion.samplers import SAMPLERS
from policy_models.diffusion.schedules import SCHEDULES
from policy_models.divla.config import DivlaConfig
from policy_models.program import Assets, Graph
from policy_models.spec import PolicySpec

if TYPE_CHECKING:
    from torch import Tensor

    from policy_models.divla.program import DivlaProgram

Config = DivlaConfig

_WORDS = 32  # of the prompt among a graph's examples; any other number will do as well


def make_program(spec: PolicySpec, config: DivlaConfig, assets: Assets) -> "DivlaProgram":
    """Return the program of one bundle; raises ValueError if the parts do not fit each other."""
    from policy_models.divla.program import DivlaProgram
    from policy_models.divla.prompt import Vocabulary

    if spec.sampler is None or spec.reasoning is None or spec.state is None or spec.goal.kind != "text":
        raise ValueError("a DiVLA bundle needs a sampler, reasoning, a state and a goal of kind 'text'")
    if not spec.goal.required:
        raise ValueError("DiVLA follows instructions: goal.required must be true")
    if len({(camera.height, camera.width) for camera in spec.cameras}) != 1:
        raise ValueError("a DiVLA bundle needs cameras, and images of one size")
    if spec.sampler.sampler not in SAMPLERS or spec.sampler.schedule not in SCHEDULES:
        raise ValueError(
            f"sampler {spec.sampler.sampler!r} with schedule {spec.sampler.schedule!r}; there are the samplers "
            f"{', '.join(SAMPLERS)} and the schedules {', '.join(SCHEDULES)}"
        )
    for what, got, fits in (
        ("action width", spec.action.width, config.action_width),
        ("state width", spec.state.width, config.state_width),
        ("horizon", spec.horizon, config.horizon),
        ("window", spec.window, 1),
    ):
        if got != fits:
            raise ValueError(f"{what} is {got}, but the network has {fits}")
    if spec.reasoning.tokens > config.reasoning_tokens:
        raise ValueError(f"reasoning has {spec.reasoning.tokens} tokens, but the network has {config.reasoning_tokens}")
    if assets.tokenizer is None or assets.normalizer is None:
        raise ValueError("a DiVLA bundle needs a tokenizer.json and a normalizer.json")
    return DivlaProgram(spec, config, Vocabulary(assets.tokenizer), assets.normalizer)


def make_graphs(spec: PolicySpec, config: DivlaConfig, weights: "Mapping[str, Tensor]") -> dict[str, Graph]:
    """Return the graphs of one bundle in torch, with example inputs of batch 2; weights must fit key by key."""
    import torch

    from policy_models.divla.graphs import language_graphs
    from policy_models.divla.network import DivlaNetworks, HearAndFuse, Inject, ReadAndFuse, Weigh
    from policy_models.divla.prompt import token_grid

    networks = DivlaNetworks.of(config, weights)
    networks.eval()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> "Tensor":
        return torch.randn(*shape, generator=generator)

    camera, width, denoiser = spec.cameras[0], config.language.width, networks.denoiser.eval()
    rows, columns = token_grid(config.eyes, camera.height, camera.width)
    graphs = language_graphs(
        networks.vlm,
        config,
        images=len(spec.cameras),
        height=camera.height,
        width=camera.width,
        length=len(spec.cameras) * rows * columns + _WORDS,
    )
    return {
        **graphs,
        # Hidden states stay where they are: the head is told two rows of them.
        "read": replace(
            graphs["read"],
            module=ReadAndFuse(networks).eval(),
            outputs=("logits", "cache", "projected", "pooled"),
        ),
        "hear": replace(graphs["hear"], module=HearAndFuse(networks).eval(), outputs=("features",)),
        "weigh": Graph(
            Weigh(networks.fusion).eval(),
            {
                "hidden": draw(2, config.reasoning_tokens, width),
                "mask": torch.ones(2, config.reasoning_tokens, dtype=torch.int64),
            },
            ("features",),
        ),
        "inject": Graph(
            Inject(networks.fusion).eval(),
            {"projected": draw(2, width), "pooled": draw(2, width), "features": draw(2, width)},
            ("context",),
        ),
        "denoise": Graph(
            denoiser,
            {
                "noisy": draw(2, config.horizon, config.action_width),
                "sigma": draw(2).abs() + 0.1,
                "context": draw(2, width),
                "state": draw(2, config.state_width),
            },
            ("denoised",),
            differentiated=denoiser,
        ),
    }
