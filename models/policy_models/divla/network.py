"""A whole DiVLA policy in torch, and its graphs where they are more than one part of it."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from policy_models.divla.config import DivlaConfig
from policy_models.divla.denoiser import Denoiser, make_head
from policy_models.divla.fusion import Fusion
from policy_models.divla.graphs import Hear, Read
from policy_models.divla.vlm import load_weights, make_vlm


class DivlaNetworks(nn.Module):
    """The language model that sees, what its hidden states become, and the head that denoises."""

    def __init__(self, config: DivlaConfig) -> None:
        super().__init__()
        self.vlm = make_vlm(config)
        self.fusion = Fusion(config.language.width)
        self.head = make_head(config)

    @classmethod
    def of(cls, config: DivlaConfig, weights: Mapping[str, Tensor]) -> Self:
        """Return networks that have these weights, see `load`; none are drawn first, which would take a minute."""
        with torch.device("meta"):
            networks = cls(config)
        networks.load(weights)
        return networks

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights by the names of a bundle; they are not copied, since a released policy's are 4 GB.

        Raises:
            RuntimeError, ValueError: They do not fit key by key.
        """
        parts: dict[str, dict[str, Tensor]] = {"vlm": {}, "fusion": {}, "head": {}}
        for name, value in weights.items():
            part, _, key = name.partition(".")
            if part not in parts:
                raise ValueError(f"{name!r} is a weight of no part; there are {', '.join(parts)}")
            parts[part][key] = value
        load_weights(self.vlm, parts["vlm"])
        self.fusion.load_state_dict(parts["fusion"], assign=True)
        self.head.load_state_dict(parts["head"], assign=True)

    @property
    def denoiser(self) -> Denoiser:
        """The head over noise levels."""
        return Denoiser(self.head)


class ReadAndFuse(nn.Module):
    """The `read` graph: what `Read` gives, and what the head is told of the prompt."""

    def __init__(self, networks: DivlaNetworks) -> None:
        super().__init__()
        self.read = Read(networks.vlm)
        self.fusion = networks.fusion

    def forward(
        self, tokens: Tensor, places: Tensor, images: Tensor, positions: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits, cache, p and mean; see `Read` and `Fusion.prefix_part`."""
        hidden, logits, cache = self.read(tokens, places, images, positions, mask)
        p, mean = self.fusion.prefix_part(hidden, mask)
        return logits, cache, p, mean


class HearAndFuse(nn.Module):
    """The `hear` graph: an answer that somebody else gave to its features."""

    def __init__(self, networks: DivlaNetworks) -> None:
        super().__init__()
        self.hear = Hear(networks.vlm)
        self.fusion = networks.fusion

    def forward(self, tokens: Tensor, positions: Tensor, heard: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
        """Return r, (B, C); see `Hear` and `Fusion.reasoning_part`."""
        return self.fusion.reasoning_part(self.hear(tokens, positions, heard, cache, mask), heard)


class Weigh(nn.Module):
    """The `weigh` graph: hidden states of an answer to its features."""

    def __init__(self, fusion: Fusion) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """See `Fusion.reasoning_part`."""
        return self.fusion.reasoning_part(hidden, mask)


class Inject(nn.Module):
    """The `inject` graph: prompt and features to what the head is told."""

    def __init__(self, fusion: Fusion) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, projected: Tensor, pooled: Tensor, features: Tensor) -> Tensor:
        """See `Fusion.inject`."""
        return self.fusion.inject(projected, pooled, features)
