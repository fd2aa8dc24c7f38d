"""Goal encoders of MoDE: CLIP's text tower and its image tower (Radford et al. 2021), as transformers has them.

Upstream feeds the projected embedding without normalising its length.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from policy_models.mode.config import CLIP_MEAN, CLIP_STD, TextConfig, VisionConfig


class Language(nn.Module):
    """The `language` graph: tokens in, one embedding per instruction out."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.clip = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.context,
                projection_dim=config.projection,
                hidden_act="quick_gelu",
                # CLIP's vocabulary ends with the end-of-text token, and the embedding is read there.
                eos_token_id=config.vocabulary - 1,
                bos_token_id=config.vocabulary - 2,
                pad_token_id=0,
            )
        )
        self.clip.set_attn_implementation("eager")

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, context) int64, padded with zeros, to (B, projection)."""
        return self.clip(input_ids=tokens).text_embeds


class GoalImage(nn.Module):
    """The `look_at_goal` graph: goal images in, one embedding per image out."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.clip = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                image_size=config.image,
                patch_size=config.patch,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                projection_dim=config.projection,
                hidden_act="quick_gelu",
            )
        )
        self.clip.set_attn_implementation("eager")
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, h, w, 3) uint8 RGB to (B, projection)."""
        pixels = (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return self.clip(pixel_values=pixels).image_embeds


def text_tower(clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of `Language` from a state dict with the keys of OpenAI's CLIP."""
    weights = {
        "clip.text_model.embeddings.token_embedding.weight": clip["token_embedding.weight"],
        "clip.text_model.embeddings.position_embedding.weight": clip["positional_embedding"],
        "clip.text_projection.weight": clip["text_projection"].T,
    }
    for part in ("weight", "bias"):
        weights[f"clip.text_model.final_layer_norm.{part}"] = clip[f"ln_final.{part}"]
    return weights | _blocks(clip, "transformer.", "clip.text_model.encoder.layers.")


def image_tower(clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of `GoalImage` from a state dict with the keys of OpenAI's CLIP."""
    ours = "clip.vision_model."
    weights = {
        f"{ours}embeddings.class_embedding": clip["visual.class_embedding"],
        f"{ours}embeddings.patch_embedding.weight": clip["visual.conv1.weight"],
        f"{ours}embeddings.position_embedding.weight": clip["visual.positional_embedding"],
        "clip.visual_projection.weight": clip["visual.proj"].T,
    }
    for part in ("weight", "bias"):
        # transformers' own spelling of this layer
        weights[f"{ours}pre_layrnorm.{part}"] = clip[f"visual.ln_pre.{part}"]
        weights[f"{ours}post_layernorm.{part}"] = clip[f"visual.ln_post.{part}"]
    return weights | _blocks(clip, "visual.transformer.", f"{ours}encoder.layers.")


def _blocks(clip: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    layers = {int(key.removeprefix(theirs).split(".")[1]) for key in clip if key.startswith(f"{theirs}resblocks.")}
    weights: dict[str, Tensor] = {}
    for i in sorted(layers):
        for part in ("weight", "bias"):
            source, target = f"{theirs}resblocks.{i}.", f"{ours}{i}."
            for name, rows in zip("qkv", clip[f"{source}attn.in_proj_{part}"].chunk(3), strict=True):
                weights[f"{target}self_attn.{name}_proj.{part}"] = rows
            for their_name, our_name in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                weights[f"{target}{our_name}.{part}"] = clip[f"{source}{their_name}.{part}"]
    return weights
