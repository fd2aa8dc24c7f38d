"""The language model that sees: transformers' Qwen2-VL (Wang et al. 2024, arXiv:2409.12191), as a policy shapes it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, Qwen2VLVisionRotaryEmbedding

from policy_models.divla.config import DivlaConfig
from policy_models.divla.prompt import SpecialTokens

_HEAD, _EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


def make_vlm(config: DivlaConfig, special: SpecialTokens | None = None) -> Qwen2VLForConditionalGeneration:
    """Return Qwen2-VL with fresh weights.

    Args:
        config: Of the policy.
        special: What transformers' own `forward` and `generate` take for images, padding and the end of a turn; the
            graphs of a policy need none of it.
    """
    eyes, language = config.eyes, config.language
    ids: dict[str, Any] = {}
    if special is not None:
        ids = {
            "image_token_id": special.image,
            "vision_start_token_id": special.vision_start,
            "vision_end_token_id": special.vision_end,
        }
    vlm = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            vision_config={
                "depth": eyes.layers,
                "embed_dim": eyes.width,
                "hidden_size": language.width,
                "num_heads": eyes.heads,
                "mlp_ratio": eyes.ffn_ratio,
                "patch_size": eyes.patch,
                "spatial_merge_size": eyes.merge,
            },
            text_config={
                "vocab_size": language.vocabulary,
                "hidden_size": language.width,
                "intermediate_size": language.ffn_width,
                "num_hidden_layers": language.layers,
                "num_attention_heads": language.heads,
                "num_key_value_heads": language.kv_heads,
                "max_position_embeddings": language.context,
                "rms_norm_eps": 1e-6,  # of the released models; transformers' default is another
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": language.rope_theta,
                    "mrope_section": list(language.rope_sections),
                },
                "bos_token_id": None,
                "eos_token_id": special.end if special else None,
                # No `pad_token_id`: it would hold that row of the embedding at zero.
            },
            tie_word_embeddings=True,
            **ids,
        )
    )
    vlm.set_attn_implementation("eager")
    # The frequencies of rotary positions are in no checkpoint: they are there even in a model that is built on "meta".
    with torch.device("cpu"):
        vlm.model.visual.rotary_pos_emb = Qwen2VLVisionRotaryEmbedding(vlm.model.visual.config)
        vlm.model.language_model.rotary_emb = Qwen2VLRotaryEmbedding(vlm.model.language_model.config)
    return vlm


def load_weights(vlm: Qwen2VLForConditionalGeneration, weights: Mapping[str, Tensor]) -> None:
    """Give it weights under transformers' own names; they are not copied.

    Args:
        vlm: From `make_vlm`.
        weights: `lm_head.weight` may be left out: it is the embedding.

    Raises:
        ValueError: They do not fit key by key and shape by shape.
    """
    head = weights.get(_HEAD)
    if head is not None and _EMBEDDING in weights and not torch.equal(head, weights[_EMBEDDING]):
        raise ValueError(f"{_HEAD} differs from {_EMBEDDING}; only models whose embeddings are tied can be read")
    try:
        missing, unexpected = vlm.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:  # a shape that does not fit
        raise ValueError(str(error)) from error
    missing = [name for name in missing if name != _HEAD]
    if missing or unexpected:
        raise ValueError(f"weights lack {missing or 'nothing'} and have {unexpected or 'nothing'} besides")
    vlm.tie_weights()
