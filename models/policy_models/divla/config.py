"""The shape of one DiVLA policy: the language model that sees, what it tells the head, and the head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class EyesConfig:
    """Qwen2-VL's image tower. Attributes are those of transformers' `Qwen2VLVisionConfig`.

    Attributes:
        layers: Blocks.
        width: Width of an embedded patch.
        heads: Attention heads.
        ffn_ratio: Width of the feed-forward layers, in widths.
        patch: Pixels a side of a patch.
        merge: Patches a side that become one token.
    """

    __pydantic_config__ = _STRICT

    layers: int = 32
    width: int = 1280
    heads: int = 16
    ffn_ratio: int = 4
    patch: int = 14
    merge: int = 2


@dataclass(frozen=True)
class LanguageConfig:
    """Qwen2-VL's language model. Attributes are those of transformers' `Qwen2VLTextConfig`.

    Attributes:
        vocabulary: Tokens.
        width: Width of a hidden state, C.
        layers: Blocks.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        ffn_width: Width of the feed-forward layers.
        rope_theta: Base of the rotary embedding.
        rope_sections: How many of its frequencies turn with time, height and width.
        context: The longest sequence, images, instruction and reasoning together.
    """

    __pydantic_config__ = _STRICT

    vocabulary: int = 151936
    width: int = 1536
    layers: int = 28
    heads: int = 12
    kv_heads: int = 2
    ffn_width: int = 8960
    rope_theta: float = 1e6
    rope_sections: tuple[int, int, int] = (16, 24, 24)
    context: int = 4096

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads and {self.kv_heads} of keys do not divide a width of {self.width}")
        if 2 * sum(self.rope_sections) != self.width // self.heads:
            raise ValueError(
                f"rope_sections {self.rope_sections} must add up to half a head, {self.width // self.heads}/2"
            )


@dataclass(frozen=True)
class ScaleDpConfig:
    """ScaleDP, a diffusion transformer with adaptive layer norms (Zhu et al. 2024, arXiv:2409.14411)."""

    __pydantic_config__ = _STRICT

    layers: int
    width: int
    heads: int
    kind: Literal["scale_dp"] = "scale_dp"


@dataclass(frozen=True)
class UnetConfig:
    """Diffusion Policy's conditional UNet over time (Chi et al. 2023, arXiv:2303.04137)."""

    __pydantic_config__ = _STRICT

    widths: tuple[int, ...] = (256, 512, 1024)
    kernel: int = 5
    groups: int = 8
    step_width: int = 256
    kind: Literal["unet"] = "unet"


# L and H are what was published with DexVLA; S and B are DiT's (Peebles and Xie 2023, Table 1), which ScaleDP follows.
SCALE_DP: Mapping[str, ScaleDpConfig] = {
    "S": ScaleDpConfig(layers=12, width=384, heads=6),
    "B": ScaleDpConfig(layers=12, width=768, heads=12),
    "L": ScaleDpConfig(layers=24, width=1024, heads=16),
    "H": ScaleDpConfig(layers=32, width=1280, heads=16),
}


@dataclass(frozen=True)
class DivlaConfig:
    """A whole DiVLA policy.

    Attributes:
        head: What denoises actions.
        state_width: S.
        action_width: A.
        horizon: Actions in a chunk, H.
        eyes: What sees.
        language: What reads and reasons.
        reasoning_tokens: The most tokens of one reasoning.
        system: The first words of every prompt.
    """

    __pydantic_config__ = _STRICT

    head: ScaleDpConfig | UnetConfig
    state_width: int
    action_width: int
    horizon: int
    eyes: EyesConfig = EyesConfig()
    language: LanguageConfig = LanguageConfig()
    reasoning_tokens: int = 256
    system: str = "You are a helpful assistant."
