"""Upstream's DiVLA and DexVLA checkpoints, key by key.

A full fine-tune is a folder of safetensors with language model, fusion and head; a LoRA fine-tune (`lora`) adds to a
base. Both come with upstream's `config.json` and, beside it or one folder above, the statistics of the data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policy_models.divla.config import SCALE_DP, DivlaConfig, EyesConfig, LanguageConfig, ScaleDpConfig, UnetConfig
from policy_models.divla.denoiser import make_head
from policy_models.divla.fusion import Fusion
from policy_models.divla.lora import is_lora, read_merged
from policy_models.divla.scale_dp import ScaleDp
from policy_models.divla.state_dict import (
    CheckpointMismatch,
    as_state_dict,
    compare,
    listed,
    read_json,
    read_plain,
    read_weights,
)
from policy_models.divla.statistics import read_statistics
from policy_models.normalizer import Normalizer

_Shapes = dict[str, tuple[int, ...]]

# Where upstream's parts are in a bundle; transformers 5 has the language model one level deeper than 4.46 had it.
_PLACES = {
    "visual.": "vlm.model.visual.",
    "model.": "vlm.model.language_model.",
    "policy_head.": "head.",
    "input_action_proj.": "fusion.input_action_proj.",
    "reasoning_action_proj.": "fusion.reasoning_action_proj.",
    "reasoning_film.": "fusion.reasoning_film.",
}
_TIED, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# What a policy is trained with and our networks take for granted. An entry that is not there has this value.
_GRANTED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "using_film": True,
    "vision_config.hidden_act": "quick_gelu",
    "vision_config.in_channels": 3,
    "vision_config.temporal_patch_size": 2,
    "policy_head_config.num_train_timesteps": 100,
    "policy_head_config.mlp_ratio": 4,
    "policy_head_config.learn_sigma": False,
    "policy_head_config.is_tinyvla": False,
}


@dataclass(frozen=True)
class Checkpoint:
    """A whole policy.

    Attributes:
        config: Its shape.
        weights: By the names of a bundle: `vlm.` and a key of transformers' Qwen2VLForConditionalGeneration, `fusion.`
            and `head.` and upstream's; float32. The output layer of the language model is its embedding and not listed.
            Those that are float32 in the file are read from it when they are used: it must stay where it is.
        statistics: How states and actions are scaled.
    """

    config: DivlaConfig
    weights: dict[str, Tensor]
    statistics: Normalizer


def read_checkpoint(folder: Path, base: Path | None = None) -> Checkpoint:
    """Read a fine-tuned policy safely (no code in it is ever run).

    Args:
        folder: A full fine-tune or a LoRA fine-tune.
        base: What a LoRA fine-tune adds to: the folder of a Qwen2-VL or of an earlier policy. None if the fine-tune
            has all weights itself.

    Raises:
        CheckpointMismatch: Something is missing, unknown or of another shape than it should; the message names it.
        OSError: A file cannot be read.
    """
    if base is not None and not is_lora(folder):
        raise CheckpointMismatch(f"{folder} holds no adapter: it is a whole policy, or none, and takes no base")
    config = _read_config(folder)
    tensors = read_merged(folder, base) if is_lora(folder) else read_weights(folder)
    output = tensors.pop(_TIED, None)
    if output is not None and not torch.equal(output, tensors.get(_EMBEDDING, output)):
        raise CheckpointMismatch(f"{_TIED!r} differs from {_EMBEDDING!r}, but config.json says they are tied")
    shapes: _Shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    compare(str(folder), shapes, _expected(config), f"a policy whose config.json says {config}")
    quantized = sorted(key for key, tensor in tensors.items() if not tensor.is_floating_point())
    if quantized:
        raise CheckpointMismatch(f"{folder} has whole numbers for weights, it may be quantized: {listed(quantized)}")
    statistics = read_statistics(folder)
    for what, got, wanted in (
        ("qpos_mean", statistics.state.mean, config.state_width),
        ("action_mean", statistics.action.mean, config.action_width),
    ):
        if len(got) != wanted:
            raise CheckpointMismatch(f"the statistics' {what!r} has {len(got)} numbers, the head has {wanted}")
    return Checkpoint(config, {_renamed(key): t.float().contiguous() for key, t in tensors.items()}, statistics)


def read_stage1_head(path: Path) -> dict[str, Tensor]:
    """Read a ScaleDP that was trained without the language model, under the names of `ScaleDp`.

    Its `cond_obs_emb` was made for another condition and is left out, as upstream does it. So may `combine` be in the
    file, all of it: upstream loads what there is.

    Raises:
        CheckpointMismatch: The file needs code to load, or what is in it makes no ScaleDP; the message lists keys.
        OSError: It cannot be read.
    """
    raw = read_plain(path)
    for entry in ("nets", "nets"):
        if not isinstance(raw, Mapping) or entry not in raw:
            raise CheckpointMismatch(f"{path.name} has no ['nets']['nets'], where a stage 1 head is kept")
        raw = raw[entry]
    plain = {key.removeprefix("policy."): t for key, t in as_state_dict(path.name, raw).items()}
    head = {
        key.removeprefix("noise_pred_net."): tensor
        for key, tensor in plain.items()
        if "noise_pred" in key and "cond_obs_emb" not in key
    }
    shapes: _Shapes = {key: tuple(tensor.shape) for key, tensor in head.items()}
    try:
        _, horizon, width = shapes["pos_embed"]
        action_width, _ = shapes["final_layer.linear.weight"]
        joined = any(key.startswith("combine.") for key in shapes)
        # Without it nothing tells how wide condition and state are, and nothing depends on it.
        condition_width, _ = shapes["combine.4.weight"] if joined else (1, 1)
        state_width = shapes["combine.0.weight"][1] - condition_width if joined else 1
    except (KeyError, ValueError) as error:
        raise CheckpointMismatch(f"{path.name} has no {error}, which would tell its shape") from error
    layers = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
    with torch.device("meta"):
        expected = ScaleDp(
            ScaleDpConfig(layers, width, heads=1),
            condition_width=condition_width,
            state_width=state_width,
            action_width=action_width,
            horizon=horizon,
        )
    left_out = ("cond_obs_emb.",) if joined else ("cond_obs_emb.", "combine.")
    wanted = {key: shape for key, shape in _shapes(expected).items() if not key.startswith(left_out)}
    compare(path.name, shapes, wanted, f"a ScaleDP of {layers} layers and width {width}")
    return head


def _read_config(folder: Path) -> DivlaConfig:
    """Return the shape that `config.json` tells; it lies with the weights or, for checkpoints of a run, above them."""
    places = (folder / "config.json", folder.absolute().parent / "config.json")
    file = next((place for place in places if place.exists()), None)
    if file is None:
        raise CheckpointMismatch(f"neither {folder} nor the folder above holds a config.json")
    settings = read_json(file)

    def entry(path: str, default: Any = None) -> Any:
        value: Any = settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None and default is None:
            raise CheckpointMismatch(f"config.json has no entry {path!r}")
        return default if value is None else value

    for path, granted in _GRANTED.items():
        if entry(path, granted) != granted:
            raise CheckpointMismatch(f"config.json says {path} = {entry(path)!r}, only {granted!r} is supported")
    kind = entry("policy_head_type")
    if kind not in ("scale_dp_policy", "unet_diffusion_policy"):
        raise CheckpointMismatch(
            f"config.json says policy_head_type = {kind!r}, expected 'scale_dp_policy' or 'unet_diffusion_policy'"
        )
    # Upstream leaves out what is as it is in its own defaults, which are ours, but only inside of "vision_config".
    eyes = EyesConfig()
    try:
        config = DivlaConfig(
            head=_scale_dp(entry) if kind == "scale_dp_policy" else _unet(entry),
            state_width=int(entry("policy_head_config.state_dim")),
            action_width=int(entry("policy_head_config.input_dim")),
            horizon=int(entry("policy_head_config.prediction_horizon")),
            eyes=EyesConfig(
                layers=int(entry("vision_config.depth", eyes.layers)),
                width=int(entry("vision_config.embed_dim", eyes.width)),
                heads=int(entry("vision_config.num_heads", eyes.heads)),
                ffn_ratio=int(entry("vision_config.mlp_ratio", eyes.ffn_ratio)),
                patch=int(entry("vision_config.patch_size", eyes.patch)),
                merge=int(entry("vision_config.spatial_merge_size", eyes.merge)),
            ),
            language=LanguageConfig(
                vocabulary=int(entry("vocab_size")),
                width=int(entry("hidden_size")),
                layers=int(entry("num_hidden_layers")),
                heads=int(entry("num_attention_heads")),
                kv_heads=int(entry("num_key_value_heads")),
                ffn_width=int(entry("intermediate_size")),
                rope_theta=float(entry("rope_theta")),
                rope_sections=tuple(int(n) for n in entry("rope_scaling.mrope_section")),  # type: ignore[arg-type]
            ),
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointMismatch):
            raise
        raise CheckpointMismatch(f"config.json makes no policy: {error}") from error
    return config


def _scale_dp(entry: Any) -> ScaleDpConfig:
    layers, width, heads = (int(entry(f"policy_head_config.{name}")) for name in ("depth", "n_emb", "num_heads"))
    head = ScaleDpConfig(layers, width, heads)
    size = entry("policy_head_size", "")
    named = SCALE_DP.get(size.removeprefix("ScaleDP_"), head)
    if named != head:
        raise CheckpointMismatch(f"config.json says policy_head_size = {size!r}, which is {named}, but also {head}")
    return head


def _unet(entry: Any) -> UnetConfig:
    return UnetConfig(
        widths=tuple(int(width) for width in entry("policy_head_config.down_dims")),
        kernel=int(entry("policy_head_config.kernel_size")),
        groups=int(entry("policy_head_config.n_groups")),
        step_width=int(entry("policy_head_config.diffusion_step_embed_dim")),
    )


def _expected(config: DivlaConfig) -> _Shapes:
    """Return the shape of every tensor that such a policy has, by upstream's names."""
    try:
        with torch.device("meta"):
            head, fusion = make_head(config), Fusion(config.language.width)
    except ValueError as error:
        raise CheckpointMismatch(f"config.json makes no policy: {error}") from error
    shapes = {f"policy_head.{key}": shape for key, shape in _shapes(head).items()}
    return shapes | _shapes(fusion) | _eyes_shapes(config) | _language_shapes(config.language)


def _shapes(module: torch.nn.Module) -> _Shapes:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def _eyes_shapes(config: DivlaConfig) -> _Shapes:
    eyes = config.eyes
    width, hidden, merged = eyes.width, eyes.width * eyes.ffn_ratio, eyes.width * eyes.merge**2
    block = {
        **{f"{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")},
        **_linear("attn.qkv", width, 3 * width),
        **_linear("attn.proj", width, width),
        **_linear("mlp.fc1", width, hidden),
        **_linear("mlp.fc2", hidden, width),
    }
    return {
        "visual.patch_embed.proj.weight": (width, 3, 2, eyes.patch, eyes.patch),
        **{f"visual.blocks.{i}.{key}": shape for i in range(eyes.layers) for key, shape in block.items()},
        **{f"visual.merger.ln_q.{part}": (width,) for part in ("weight", "bias")},
        **_linear("visual.merger.mlp.0", merged, merged),
        **_linear("visual.merger.mlp.2", merged, config.language.width),
    }


def _language_shapes(language: LanguageConfig) -> _Shapes:
    width, ffn, kv_width = language.width, language.ffn_width, language.width // language.heads * language.kv_heads
    block: _Shapes = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        **_linear("self_attn.q_proj", width, width),
        **_linear("self_attn.k_proj", width, kv_width),
        **_linear("self_attn.v_proj", width, kv_width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (ffn, width),
        "mlp.up_proj.weight": (ffn, width),
        "mlp.down_proj.weight": (width, ffn),
    }
    return {
        _EMBEDDING: (language.vocabulary, width),
        **{f"model.layers.{i}.{key}": shape for i in range(language.layers) for key, shape in block.items()},
        "model.norm.weight": (width,),
    }


def _linear(name: str, width_in: int, width: int) -> _Shapes:
    return {f"{name}.weight": (width, width_in), f"{name}.bias": (width,)}


def _renamed(key: str) -> str:
    place = next(prefix for prefix in _PLACES if key.startswith(prefix))
    return _PLACES[place] + key.removeprefix(place)
