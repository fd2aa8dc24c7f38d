"""The shape of one MoDE policy: transformer, image encoders, goal encoder."""

from dataclasses import dataclass
from typing import Literal

_STRICT = {"extra": "forbid"}

# What CLIP's images, and so upstream's, are scaled with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TransformerConfig:
    """The denoising transformer. Sequence: [sigma, goal, image_1..C, a_1, ..., a_H].

    Attributes:
        action_width: A.
        horizon: Actions in a chunk, H.
        width: Embedding width d.
        layers: Transformer blocks.
        heads: Attention heads.
        goal_width: Width of an embedded goal.
        token_width: Width of an encoded image.
        experts: Experts that a router chooses among, in every block.
        top_k: How many it chooses.
        shared_expert: One more expert in every block that every noise level passes through, with weight 1.
        noise_token: Whether the embedded noise level is also the first token.
        goal_routing: Whether the goal is added to what routers and attention are conditioned on.
        sigma_data: Standard deviation of the normalised actions that the preconditioning assumes.
        merged: Where a network was compressed (see `merge`): for every block, which of the experts that it kept answers
            for each of the router's, counted from 0 without a gap. Empty where every expert answers for itself.
    """

    __pydantic_config__ = _STRICT

    action_width: int
    horizon: int
    width: int
    layers: int
    heads: int
    goal_width: int
    token_width: int
    experts: int = 4
    top_k: int = 2
    shared_expert: bool = False
    noise_token: bool = True
    goal_routing: bool = False
    sigma_data: float = 0.5
    merged: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide an embedding of width {self.width}")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"a router cannot choose {self.top_k} of {self.experts} experts")
        if self.merged and [len(answers) for answers in self.merged] != [self.experts] * self.layers:
            raise ValueError(
                f"'merged' must say who answers for each of {self.experts} experts in each of {self.layers} blocks, "
                f"got {self.merged}"
            )
        for answers in self.merged:
            if set(answers) != set(range(max(answers) + 1)):
                raise ValueError(f"the experts that are kept must count from 0 without a gap, got {answers}")

    @property
    def kept(self) -> tuple[int, ...]:
        """How many experts each block has: `experts`, unless some were merged."""
        return tuple(max(answers) + 1 for answers in self.merged) or (self.experts,) * self.layers


@dataclass(frozen=True)
class ImageConfig:
    """How camera images become tokens: one FiLM-conditioned ResNet per camera.

    Attributes:
        encoder: "resnet34" and "resnet50" modulate after every stage (1 + gamma), "resnet18" inside every block
            (gamma alone) and ends in a linear layer; that is how they were published.
        channels: Channels of the first stage; 64 in every published network.
        mean: Subtracted from images scaled to [0, 1], by channel.
        std: Divides what remains, by channel.
    """

    __pydantic_config__ = _STRICT

    encoder: Literal["resnet18", "resnet34", "resnet50"]
    channels: int = 64
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text tower. Attributes are those of transformers' `CLIPTextConfig`."""

    __pydantic_config__ = _STRICT

    vocabulary: int = 49408
    width: int = 512
    layers: int = 12
    heads: int = 8
    context: int = 77
    projection: int = 512


@dataclass(frozen=True)
class VisionConfig:
    """CLIP's image tower, for goals that are images. Attributes are those of transformers' `CLIPVisionConfig`."""

    __pydantic_config__ = _STRICT

    image: int = 224
    patch: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    projection: int = 512


@dataclass(frozen=True)
class ModeConfig:
    """A whole MoDE policy; exactly one of `text` and `vision` encodes its goals."""

    __pydantic_config__ = _STRICT

    transformer: TransformerConfig
    images: ImageConfig
    text: TextConfig | None = None
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        tower = self.text or self.vision
        if tower is None or (self.text and self.vision):
            raise ValueError("exactly one of 'text' and 'vision' encodes the goals")
        if tower.projection != self.transformer.goal_width:
            raise ValueError(
                f"goals are embedded {tower.projection} wide, but the transformer takes {self.transformer.goal_width}"
            )
