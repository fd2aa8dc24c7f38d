"""Upstream's DiVLA checkpoints: loaded key by key, safely, in every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from policy_models.divla.checkpoint import read_checkpoint, read_stage1_head
from policy_models.divla.config import DivlaConfig
from policy_models.divla.denoiser import make_head
from policy_models.divla.state_dict import CheckpointMismatch
from tests.unit.divla_files import (
    SMALL,
    SMALL_UNET,
    Change,
    Tensors,
    assert_answers,
    put,
    settings,
    small_parts,
    small_vlm,
    upstream_parts,
    whole,
    without,
    write_lora,
    write_policy,
    write_statistics,
)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [SMALL, SMALL_UNET], ids=["scale_dp", "unet"])
def test_a_full_fine_tune_loads_key_by_key(tmp_path: Path, config: DivlaConfig, shards: int) -> None:
    folder = write_policy(tmp_path / "checkpoint-10", whole(config), settings(config), shards=shards)
    loaded = read_checkpoint(folder)
    assert loaded.config == config
    assert_answers(loaded, small_vlm(), *small_parts(config))


def test_the_names_of_newer_transformers_load_too(tmp_path: Path) -> None:
    tensors = small_vlm().state_dict() | upstream_parts(*small_parts())
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    loaded = read_checkpoint(write_policy(tmp_path / "p", tensors, settings()))
    assert_answers(loaded, small_vlm(), *small_parts())


def test_weights_in_bfloat16_become_float32(tmp_path: Path) -> None:
    tensors = {key: tensor.bfloat16() for key, tensor in whole().items()}
    loaded = read_checkpoint(write_policy(tmp_path / "p", tensors, settings()))
    key = "blocks.1.attn.qkv.weight"
    torch.testing.assert_close(loaded.weights[f"head.{key}"], tensors[f"policy_head.{key}"].float(), rtol=0, atol=0)
    assert {tensor.dtype for tensor in loaded.weights.values()} == {torch.float32}


def test_what_upstream_leaves_out_of_config_json_is_as_in_the_released_model(tmp_path: Path) -> None:
    config = settings()
    config["vision_config"] = {"hidden_size": 32}
    with pytest.raises(CheckpointMismatch) as refused:
        read_checkpoint(write_policy(tmp_path / "p", whole(), config))
    assert "EyesConfig(layers=32, width=1280, heads=16, ffn_ratio=4, patch=14, merge=2)" in str(refused.value)


def test_config_json_may_lie_above_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "checkpoint-10", whole(), settings())
    (folder / "config.json").rename(tmp_path / "config.json")
    assert read_checkpoint(folder).config == SMALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), "missing: model.layers.1.mlp.up_proj.weight\n"),
        (without("reasoning_film.shift_fc.bias"), "missing: reasoning_film.shift_fc.bias\n"),
        (without("policy_head.pos_embed"), "missing: policy_head.pos_embed\n"),
        (put("policy_head.blocks.2.attn.qkv.bias", torch.ones(96)), "unexpected: policy_head.blocks.2.attn.qkv.bias\n"),
        (put("novel.weight", torch.ones(1)), "unexpected: novel.weight\n"),
        (put("visual.merger.ln_q.bias", torch.ones(3)), r"visual.merger.ln_q.bias \(3,\), expected \(24,\)"),
        (put("lm_head.weight", torch.ones(160, 32)), "'lm_head.weight' differs from 'model.embed_tokens.weight'"),
        (put("model.norm.weight", torch.ones(32, dtype=torch.int8)), "may be quantized: model.norm.weight"),
        (put("model.language_model.norm.weight", torch.ones(32)), "has 'model.norm.weight' twice"),
    ],
)
def test_weights_that_make_no_policy_are_named(tmp_path: Path, change: Change, message: str) -> None:
    tensors = whole()
    change(tensors)
    folder = write_policy(tmp_path / "p", tensors, settings())
    with pytest.raises(CheckpointMismatch, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("policy_head_type", None, "no entry 'policy_head_type'"),
        ("policy_head_type", "dit", "policy_head_type = 'dit', expected 'scale_dp_policy' or"),
        ("policy_head_config", None, "no entry 'policy_head_config"),
        ("policy_head_config.num_heads", None, "no entry 'policy_head_config.num_heads'"),
        ("policy_head_config.is_tinyvla", True, "is_tinyvla = True, only False"),
        ("policy_head_config.num_train_timesteps", 1000, "num_train_timesteps = 1000, only 100"),
        ("policy_head_size", "ScaleDP_H", "policy_head_size = 'ScaleDP_H', which is ScaleDpConfig.layers=32"),
        ("hidden_size", None, "no entry 'hidden_size'"),
        ("hidden_size", "wide", "makes no policy: .*'wide'"),
        ("rope_scaling", {"mrope_section": [16, 24, 24]}, "must add up to half a head"),
        ("rms_norm_eps", 1e-5, "rms_norm_eps = 1e-05, only 1e-06"),
        ("using_film", False, "using_film = False, only True"),
        ("tie_word_embeddings", False, "tie_word_embeddings = False, only True"),
    ],
)
def test_a_configuration_that_makes_no_policy_is_refused(tmp_path: Path, path: str, value: Any, message: str) -> None:
    config = settings()
    *outer, last = path.split(".")
    place = config
    for key in outer:
        place = place[key]
    place[last] = value
    with pytest.raises(CheckpointMismatch, match=message):
        read_checkpoint(write_policy(tmp_path / "p", whole(), config))


def test_a_unet_whose_horizon_cannot_be_halved_is_refused(tmp_path: Path) -> None:
    config = settings(SMALL_UNET)
    config["policy_head_config"]["prediction_horizon"] = 10
    with pytest.raises(CheckpointMismatch, match="horizon in 4s, got 10"):
        read_checkpoint(write_policy(tmp_path / "p", whole(SMALL_UNET), config))


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"holds a config\.json"):
        read_checkpoint(tmp_path)
    folder = write_policy(tmp_path / "p", whole(), settings(), shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointMismatch, match="names the file 'model-00002-of-00002.safetensors', which is not in"):
        read_checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointMismatch, match="neither model.safetensors nor model.safetensors.index.json"):
        read_checkpoint(folder)


def test_a_file_with_other_keys_than_its_index_says_is_refused(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "p", whole(), settings(), shards=2)
    shard = folder / "model-00001-of-00002.safetensors"
    save_file({**load_file(shard), "stray": torch.ones(1)}, shard)
    with pytest.raises(CheckpointMismatch, match="disagree about the keys stray"):
        read_checkpoint(folder)


def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "p", whole(), settings(), shards=2)
    save_file({"a": torch.ones(1)}, tmp_path / "else.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../else.safetensors"}}))
    with pytest.raises(CheckpointMismatch, match=r"names the file '\.\./else.safetensors'"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_torn_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_policy(tmp_path / "p", whole(), settings())
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(CheckpointMismatch, match=f"{name} could not be read"):
        read_checkpoint(folder)


def test_a_whole_policy_takes_no_base(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "p", whole(), settings())
    with pytest.raises(CheckpointMismatch, match="takes no base"):
        read_checkpoint(folder, folder)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code in a checkpoint was run')",)


def test_no_code_in_a_checkpoint_is_ever_run(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "p", {"a": torch.ones(1)}, {"trap": Trap()}, settings())
    with pytest.raises(CheckpointMismatch, match=r"non_lora_trainables\.bin could not be read as plain tensors"):
        read_checkpoint(folder)
    torch.save({"nets": {"nets": {"trap": Trap()}}}, tmp_path / "head.ckpt")
    with pytest.raises(CheckpointMismatch, match="files that need code to load are refused"):
        read_stage1_head(tmp_path / "head.ckpt")


def stage1(joined: bool = True) -> Tensors:
    """A head as stage 1 keeps it, its eyes beside it."""
    head, _ = small_parts()
    kept = {key: tensor for key, tensor in head.state_dict().items() if joined or not key.startswith("combine.")}
    eyes = {"policy.obs_encoder.conv1.weight": torch.ones(3)}
    return eyes | {f"policy.noise_pred_net.{key}": tensor for key, tensor in kept.items()}


def write_stage1(folder: Path, tensors: Tensors) -> Path:
    path = folder / "scale_dp.ckpt"
    torch.save({"nets": {"nets": tensors, "ema": {}}, "step": 10}, path)
    return path


@pytest.mark.parametrize("joined", [True, False])
def test_a_stage_1_head_loads_but_for_what_it_was_told(tmp_path: Path, joined: bool) -> None:
    loaded = read_stage1_head(write_stage1(tmp_path, stage1(joined)))
    head, _ = small_parts()
    absent, unexpected = make_head(SMALL).load_state_dict(loaded, strict=False)
    assert unexpected == []
    left_out = ("cond_obs_emb.",) if joined else ("cond_obs_emb.", "combine.")
    assert absent == [key for key in head.state_dict() if key.startswith(left_out)]
    for key, tensor in loaded.items():
        torch.testing.assert_close(tensor, head.state_dict()[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("policy.noise_pred_net.pos_embed"), "has no 'pos_embed', which would tell its shape"),
        (without("policy.noise_pred_net.blocks.1.mlp.fc1.bias"), "missing: blocks.1.mlp.fc1.bias\n"),
        (without("policy.noise_pred_net.combine.2.bias"), "missing: combine.2.bias\n"),
        (put("policy.noise_pred_net.mask", torch.ones(1)), "unexpected: mask\n"),
        (put("policy.noise_pred_net.x_embedder.bias", torch.ones(3)), r"x_embedder.bias \(3,\), expected \(32,\)"),
    ],
)
def test_a_stage_1_head_that_makes_no_network_is_named(tmp_path: Path, change: Change, message: str) -> None:
    tensors = stage1()
    change(tensors)
    with pytest.raises(CheckpointMismatch, match=message):
        read_stage1_head(write_stage1(tmp_path, tensors))


def test_a_file_that_holds_no_stage_1_head_says_where_it_was_sought(tmp_path: Path) -> None:
    torch.save({"nets": stage1()}, tmp_path / "head.ckpt")
    with pytest.raises(CheckpointMismatch, match=r"has no \['nets'\]\['nets'\]"):
        read_stage1_head(tmp_path / "head.ckpt")


def test_statistics_of_another_robot_are_refused(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "p", whole(), settings())
    write_statistics(tmp_path, qpos_mean=[0.0] * 7, qpos_std=[1.0] * 7)
    with pytest.raises(CheckpointMismatch, match="'qpos_mean' has 7 numbers, the head has 6"):
        read_checkpoint(folder)


def test_a_policy_without_statistics_is_refused(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "p", whole(), settings())
    (tmp_path / "dataset_stats.json").unlink()
    with pytest.raises(CheckpointMismatch, match=r"holds dataset_stats\.json or dataset_stats\.npz"):
        read_checkpoint(folder)
