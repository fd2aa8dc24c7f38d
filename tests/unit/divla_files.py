"""Writes small DiVLA checkpoints as upstream's training leaves them, weights of chance, and compares what is read."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from policy_models.divla.checkpoint import Checkpoint
from policy_models.divla.config import DivlaConfig, EyesConfig, LanguageConfig, ScaleDpConfig, UnetConfig
from policy_models.divla.denoiser import make_head
from policy_models.divla.fusion import Fusion

Tensors = dict[str, Tensor]
Settings = dict[str, Any]
Change = Callable[[Tensors], None]

LANGUAGE = LanguageConfig(
    vocabulary=160, width=32, layers=2, heads=4, kv_heads=2, ffn_width=64, rope_sections=(1, 1, 2)
)
EYES = EyesConfig(layers=2, width=24, heads=2, ffn_ratio=2)
SMALL = DivlaConfig(ScaleDpConfig(2, 32, 4), 6, 5, 8, EYES, LANGUAGE)
SMALL_UNET = DivlaConfig(UnetConfig((8, 16, 24), step_width=16), 6, 5, 8, EYES, LANGUAGE)

_IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
_GRID = torch.tensor([[1, 4, 4]])

_SCALE_DP = {"model_type": "scale_dp_policy", "depth": 2, "n_emb": 32, "num_heads": 4, "cond_dim": 32, "mlp_ratio": 4.0}
_UNET = {
    "model_type": "unet_diffusion_policy",
    "down_dims": [8, 16, 24],
    "kernel_size": 5,
    "n_groups": 8,
    "diffusion_step_embed_dim": 16,
    "global_cond_dim": 32,
}


def settings(config: DivlaConfig = SMALL) -> Settings:
    """What `config.json` says of a small policy."""
    head = _SCALE_DP if isinstance(config.head, ScaleDpConfig) else _UNET
    sizes = {"input_dim": config.action_width, "state_dim": config.state_width, "prediction_horizon": config.horizon}
    granted = {"num_train_timesteps": 100, "is_tinyvla": False}
    return copy.deepcopy(
        {
            "architectures": ["Qwen2VLForConditionalGenerationForVLA"],
            "model_type": "qwen2_vla",
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": config.language.vocabulary,
            # Patch and merge are as in the library's defaults, which it leaves out.
            "vision_config": {"depth": 2, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2},
            "using_film": True,
            "policy_head_type": head["model_type"],
            "policy_head_config": {**head, **sizes, **granted},
        }
    )


def small_vlm(seed: int = 0, vocabulary: int = LANGUAGE.vocabulary) -> Qwen2VLForConditionalGeneration:
    """A language model with eyes, of chance."""
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={"depth": 2, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2},
        tie_word_embeddings=True,
    )
    vlm = Qwen2VLForConditionalGeneration(config).eval()
    _draw(vlm, seed)
    return vlm


def small_parts(config: DivlaConfig = SMALL, seed: int = 0) -> tuple[nn.Module, Fusion]:
    """Head and fusion, of chance."""
    head, fusion = make_head(config).eval(), Fusion(config.language.width).eval()
    _draw(head, seed + 1)
    _draw(fusion, seed + 2)
    return head, fusion


def upstream_vlm(vlm: nn.Module) -> Tensors:
    """Its weights as transformers 4.46 calls them; the output layer is the embedding, and not there twice."""
    return {
        key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor.contiguous()
        for key, tensor in vlm.state_dict().items()
        if key != "lm_head.weight"
    }


def upstream_parts(head: nn.Module, fusion: Fusion) -> Tensors:
    """Weights of the parts that are upstream's own."""
    return {f"policy_head.{key}": tensor for key, tensor in head.state_dict().items()} | fusion.state_dict()


def whole(config: DivlaConfig = SMALL) -> Tensors:
    """All of a small policy, under upstream's names."""
    vlm = small_vlm(vocabulary=config.language.vocabulary)
    return upstream_vlm(vlm) | upstream_parts(*small_parts(config))


def without(key: str) -> Change:
    """A change to a checkpoint: this tensor is missing."""
    return lambda tensors: tensors.__delitem__(key)


def put(key: str, tensor: Tensor) -> Change:
    """A change to a checkpoint: this tensor is there."""
    return lambda tensors: tensors.update({key: tensor})


def write_policy(folder: Path, tensors: Tensors, config: Settings, *, shards: int = 1) -> Path:
    """Write a full fine-tune: a checkpoint of a run, with the statistics one folder above."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_statistics(folder.parent)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(tensors)}
    for name in set(where.values()):
        save_file({key: tensors[key] for key, file in where.items() if file == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_lora(folder: Path, adapter: Tensors, others: Tensors, config: Settings, **settings: Any) -> Path:
    """Write a LoRA fine-tune as peft and upstream do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_statistics(folder.parent)
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "bias": "none", "use_rslora": False, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **settings}))
    save_file(adapter, folder / "adapter_model.safetensors")
    torch.save(others, folder / "non_lora_trainables.bin")
    return folder


def statistics() -> dict[str, np.ndarray]:
    """As upstream's `get_norm_stats` returns them."""
    return {
        "action_mean": np.zeros(5, np.float32),
        "action_std": np.ones(5, np.float32),
        "action_min": np.full(5, -2, np.float32),
        "action_max": np.full(5, 4, np.float32),
        "qpos_mean": np.arange(6, dtype=np.float32),
        "qpos_std": np.full(6, 2, np.float32),
        "example_qpos": np.zeros((7, 6), np.float32),
    }


def write_statistics(folder: Path, **changed: Any) -> Path:
    """Write statistics as JSON; None leaves one out."""
    values = {key: value for key, value in {**statistics(), **changed}.items() if value is not None}
    path = folder / "dataset_stats.json"
    path.write_text(json.dumps({key: np.asarray(value).tolist() for key, value in values.items()}))
    return path


def assert_answers(loaded: Checkpoint, vlm: nn.Module, head: nn.Module, fusion: Fusion) -> None:
    """A policy with the loaded weights, and no others, answers as these networks do."""
    built = small_vlm(seed=5)
    absent, unexpected = built.load_state_dict(_part(loaded, "vlm"), strict=False)
    assert (absent, unexpected) == (["lm_head.weight"], []), "which is the embedding"
    built_head, built_fusion = make_head(loaded.config), Fusion(loaded.config.language.width)
    built_head.load_state_dict(_part(loaded, "head"))
    built_fusion.load_state_dict(_part(loaded, "fusion"))
    assert {key.split(".")[0] for key in loaded.weights} == {"vlm", "head", "fusion"}
    assert {tensor.dtype for tensor in loaded.weights.values()} == {torch.float32}
    for got, wanted in zip(_answers(built), _answers(vlm), strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(_denoised(built_head, built_fusion), _denoised(head, fusion))


@torch.no_grad()
def _answers(vlm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a language model says of words, and sees in pixels."""
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(9))
    return vlm(input_ids=_IDS).logits, vlm.model.visual(pixels, grid_thw=_GRID).last_hidden_state


@torch.no_grad()
def _denoised(head: nn.Module, fusion: Fusion) -> Tensor:
    """What a head makes of noise, told what fusion makes of hidden states."""
    generator = torch.Generator().manual_seed(8)
    hidden, noisy, state = (torch.randn(2, *shape, generator=generator) for shape in ((7, 32), (8, 5), (6,)))
    prefix = (torch.arange(7) < 4).expand(2, 7)
    return head(noisy, torch.tensor([10, 90]), fusion(hidden, prefix, ~prefix), state)


def _part(loaded: Checkpoint, name: str) -> Tensors:
    return {k.removeprefix(f"{name}."): t for k, t in loaded.weights.items() if k.startswith(f"{name}.")}


def _draw(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 2.0
        parameter.data = torch.randn(parameter.shape, generator=generator) / scale
