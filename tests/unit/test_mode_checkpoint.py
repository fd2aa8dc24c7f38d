"""Public MoDE checkpoints: loaded key by key, safely, in every spelling."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from policy_models.mode.assembly import ModeNetworks
from policy_models.mode.checkpoint import load_checkpoint
from policy_models.mode.config import ImageConfig, ModeConfig, TextConfig, TransformerConfig, VisionConfig
from policy_models.mode.state_dict import CheckpointMismatch
from tests.unit.mode_files import (
    CLIP,
    NETWORK,
    RELEASED,
    SMALL,
    Tensors,
    drawn,
    small_keys,
    with_encoder,
    with_shared_expert,
    write,
    write_holes,
)

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def released() -> Tensors:
    return drawn(small_keys())


def assert_holds(weights: Tensors, tensors: Tensors, config: ModeConfig) -> None:
    """Every tensor of the file that upstream reads is in `weights`, and they make a whole policy."""
    renamed = {
        NETWORK: "denoiser.inner_model.",
        "static_resnet.": "perceive.encoders.static.",
        "gripper_resnet.": "perceive.encoders.gripper.",
    }
    for key, tensor in tensors.items():
        prefix = next((p for p in renamed if key.startswith(p)), None)
        if prefix and not key.endswith("gripper_embed.weight"):
            torch.testing.assert_close(weights[renamed[prefix] + key.removeprefix(prefix)], tensor, rtol=0, atol=0)
    visual = config.vision is not None
    graph = "look_at_goal.clip.vision_model." if visual else "language.clip.text_model."
    theirs = f"{CLIP}{'visual.' if visual else ''}transformer.resblocks.1."
    query = tensors[f"{theirs}attn.in_proj_weight"][:64].float()
    value = tensors[f"{theirs}attn.in_proj_bias"][128:].float()
    torch.testing.assert_close(weights[f"{graph}encoder.layers.1.self_attn.q_proj.weight"], query, rtol=0, atol=0)
    torch.testing.assert_close(weights[f"{graph}encoder.layers.1.self_attn.v_proj.bias"], value, rtol=0, atol=0)
    assert {t.dtype for key, t in weights.items() if not key.endswith("num_batches_tracked")} == {torch.float32}
    ModeNetworks(config, ("static", "gripper")).load_state_dict(weights, assign=True)


@pytest.mark.parametrize("name", ["model_cleaned.safetensors", "model_cleaned.pt"])
@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_released_file_loads_key_by_key(tmp_path: Path, released: Tensors, name: str, as_folder: bool) -> None:
    path = write(tmp_path, released, name)
    loaded = load_checkpoint(tmp_path if as_folder else path)
    assert loaded.config == SMALL
    assert_holds(loaded.weights, released, loaded.config)


@pytest.mark.parametrize("encoder", ["resnet18", "resnet34"])
def test_the_image_encoder_is_read_from_the_keys(tmp_path: Path, encoder: Any) -> None:
    tensors = drawn(with_encoder(encoder))
    loaded = load_checkpoint(write(tmp_path, tensors))
    transformer = replace(SMALL.transformer, token_width=64)
    assert loaded.config == replace(SMALL, transformer=transformer, images=ImageConfig(encoder, 8))
    assert_holds(loaded.weights, tensors, loaded.config)


def test_a_shared_expert_is_one_of_top_k(tmp_path: Path) -> None:
    tensors = drawn(with_shared_expert())
    loaded = load_checkpoint(write(tmp_path, tensors))
    assert loaded.config.transformer == replace(SMALL.transformer, experts=3, top_k=1, shared_expert=True)
    assert_holds(loaded.weights, tensors, loaded.config)


def test_goals_that_are_images_take_the_image_tower_of_clip(tmp_path: Path, released: Tensors) -> None:
    loaded = load_checkpoint(write(tmp_path, released), goal="image")
    assert loaded.config == replace(SMALL, text=None, vision=VisionConfig(224, 32, 64, 2, 1, 64))
    assert not any(key.startswith("language.") for key in loaded.weights)
    assert_holds(loaded.weights, released, loaded.config)


def test_what_no_shape_tells_can_be_said(tmp_path: Path, released: Tensors) -> None:
    path = write(tmp_path, released)
    loaded = load_checkpoint(path, top_k=1, noise_token=False, goal_routing=True, sigma_data=0.7)
    told = replace(SMALL.transformer, top_k=1, noise_token=False, goal_routing=True, sigma_data=0.7)
    assert loaded.config.transformer == told


SPELLINGS: dict[str, Callable[[str], str]] = {
    "save_to_hf.py": lambda key: key.replace("model.", ""),
    "primary camera": lambda key: key.replace("static_resnet.", "img_encoder_image_primary."),
    "secondary camera": lambda key: key.replace("static_resnet.", "img_encoder_image_secondary."),
    "wrist camera": lambda key: key.replace("gripper_resnet.", "img_encoder_image_wrist."),
    "bare network": lambda key: key.replace("gripper_resnet.resnet.", "net."),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_every_known_spelling_of_the_keys_loads(
    tmp_path: Path, released: Tensors, spelling: Callable[[str], str]
) -> None:
    loaded = load_checkpoint(write(tmp_path, {spelling(key): tensor for key, tensor in released.items()}))
    assert loaded.config == SMALL
    assert_holds(loaded.weights, released, loaded.config)


def checkpoint_of_a_run(tensors: Tensors, averages: object, **more: object) -> dict[str, object]:
    return {"state_dict": tensors, "callbacks": {"EMA": {"cur_step": 3, "ema_weights": averages}}, "epoch": 1, **more}


def test_averaged_weights_are_taken_in_the_order_of_the_state_dict(tmp_path: Path, released: Tensors) -> None:
    averaged = drawn(small_keys(), seed=1)
    torch.save(checkpoint_of_a_run(released, list(averaged.values())), tmp_path / "last.ckpt")
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    assert_holds(loaded.weights, averaged, loaded.config)


def test_averages_of_parameters_alone_leave_the_buffers_as_they_are(tmp_path: Path, released: Tensors) -> None:
    averaged = {k: t for k, t in drawn(small_keys(), seed=1).items() if not k.endswith(BUFFERS)}
    torch.save(checkpoint_of_a_run(released, list(averaged.values())), tmp_path / "last.ckpt")
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    assert_holds(loaded.weights, {**released, **averaged}, loaded.config)


def test_a_run_that_kept_no_averages_gives_its_weights(tmp_path: Path, released: Tensors) -> None:
    torch.save(checkpoint_of_a_run(released, None), tmp_path / "last.ckpt")
    assert_holds(load_checkpoint(tmp_path / "last.ckpt").weights, released, SMALL)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda averages: averages[1:], r"holds \d+ moving averages for \d+ tensors, \d+ of them parameters"),
        (lambda averages: [averages[1], averages[0], *averages[2:]], rf"first at '{NETWORK}pos_emb'"),
        (lambda averages: "lost", "holds 4 moving averages"),
        (lambda averages: 3, "holds unreadable moving averages"),
    ],
    ids=["one too few", "another order", "text", "a number"],
)
def test_averages_that_do_not_fit_the_weights_are_refused(
    tmp_path: Path, released: Tensors, spoil: Callable[[list[Tensor]], object], message: str
) -> None:
    torch.save(checkpoint_of_a_run(released, spoil(list(released.values()))), tmp_path / "last.ckpt")
    with pytest.raises(CheckpointMismatch, match=message):
        load_checkpoint(tmp_path / "last.ckpt")


def test_a_checkpoint_that_needs_code_is_refused_with_the_command_that_helps(tmp_path: Path, released: Tensors) -> None:
    averaged = drawn(small_keys(), seed=1)
    # Lightning stores the run's configuration as objects of omegaconf's; any class will do here.
    run = checkpoint_of_a_run(released, list(averaged.values()), hyper_parameters=argparse.Namespace(width=1))
    torch.save(run, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointMismatch, match=r"last\.ckpt needs code to load \(argparse\.Namespace\)") as caught:
        load_checkpoint(tmp_path / "last.ckpt")
    _, script = shlex.split(str(caught.value).partition("python ")[2])
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    loaded = load_checkpoint(tmp_path / "last-weights.pt")
    assert_holds(loaded.weights, averaged, loaded.config)


def test_what_is_missing_unexpected_or_misshapen_is_listed(tmp_path: Path, released: Tensors) -> None:
    tensors = {key: t for key, t in released.items() if not key.startswith("gripper_resnet.resnet.layer2")}
    del tensors[f"{NETWORK}blocks.1.attn.key.bias"]
    tensors[f"{NETWORK}blocks.0.extra"] = torch.zeros(1)
    tensors[f"{NETWORK}goal_emb.weight"] = torch.zeros(128, 32)
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(write(tmp_path, tensors))
    message = str(caught.value)
    assert "missing: gripper_resnet.resnet.layer2.0.bn1.bias, " in message
    assert re.search(r"layer2\.\S+ and \d+ more\n", message), "a long list is shortened"
    assert f"unexpected: {NETWORK}blocks.0.extra\n" in message
    assert f"wrong shape: {NETWORK}goal_emb.weight (128, 32), expected (128, 64)" in message


BESO = {"inner_model.tok_emb.weight": torch.zeros(2, 2), "inner_model.action_pred.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.update({f"{NETWORK}state_embed.weight": torch.zeros(128, 7)}), "see the robot's state"),
        (lambda t: t.pop(f"{NETWORK}pos_emb"), f"no tensor '{NETWORK}pos_emb'"),
        (lambda t: t.update({f"{NETWORK}pos_emb": torch.zeros(11, 128)}), "shape of .* cannot be read"),
        (lambda t: t.update({f"{NETWORK}blocks.0.attn.q_norm.g": torch.zeros(0)}), "shape of .* cannot be read"),
        (lambda t: t.update({f"{NETWORK}blocks.0.attn.q_norm.g": torch.zeros(24)}), "5 heads do not divide"),
        (lambda t: t.update({f"{CLIP}token_embedding.weight": torch.zeros(9, 65)}), "no number of heads of 64"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith(CLIP)], "no tensor 'language_goal.clip_rn50"),
        (lambda t: t.update({f"{NETWORK}ln.g": torch.ones(128, dtype=torch.int8)}), "may be quantized: .*ln.g"),
        (lambda t: t.update({"net.conv1.weight": torch.zeros(1)}), "gripper_resnet.resnet.conv1.weight' twice"),
        (lambda t: (t.clear(), t.update(BESO)), "a BESO network, which has an import of its own"),
        (lambda t: (t.clear(), t.update(w=torch.zeros(1))), "holds no MoDE agent; its keys are w"),
        (lambda t: t.clear(), "holds no MoDE agent; its keys are nothing"),
    ],
    ids=[
        "proprioception",
        "no positions",
        "flat positions",
        "heads of no width",
        "odd heads",
        "odd CLIP",
        "no CLIP",
        "quantized",
        "two spellings",
        "BESO",
        "unrelated",
        "empty",
    ],
)
def test_other_networks_are_refused(
    tmp_path: Path, released: Tensors, spoil: Callable[[Tensors], object], message: str
) -> None:
    tensors = dict(released)
    spoil(tensors)
    with pytest.raises(CheckpointMismatch, match=message):
        load_checkpoint(write(tmp_path, tensors))


def test_a_clip_whose_image_tower_is_a_resnet_serves_instructions_and_not_images(
    tmp_path: Path, released: Tensors
) -> None:
    tensors = {key: tensor for key, tensor in released.items() if not key.startswith(f"{CLIP}visual.")}
    tensors[f"{CLIP}visual.attnpool.c_proj.weight"] = torch.zeros(1)
    path = write(tmp_path, tensors)
    assert load_checkpoint(path).config == SMALL
    with pytest.raises(CheckpointMismatch, match="whose image tower is a transformer"):
        load_checkpoint(path, goal="image")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_broken_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\n")
    with pytest.raises(CheckpointMismatch, match=f"{name} could not be read as"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("raw", [[1], {0: torch.zeros(1)}, {"state_dict": 3}, {"state_dict": {"w": 1}}])
def test_a_file_of_anything_but_tensors_is_refused(tmp_path: Path, raw: object) -> None:
    torch.save(raw, tmp_path / "model.pt")
    with pytest.raises(CheckpointMismatch, match=r"model\.pt holds no state dict of tensors"):
        load_checkpoint(tmp_path)


def test_half_a_download_is_refused(tmp_path: Path, released: Tensors) -> None:
    path = write(tmp_path, released)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointMismatch, match="could not be read as safetensors"):
        load_checkpoint(path)


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"holds none of model_cleaned\.safetensors"):
        load_checkpoint(tmp_path)


def test_a_file_of_released_size_loads_without_being_read(tmp_path: Path) -> None:
    path, first = tmp_path / "model_cleaned.safetensors", f"{NETWORK}pos_emb"
    places = write_holes(path, RELEASED)
    wanted = torch.randn(RELEASED[first][0])
    with path.open("r+b") as file:
        file.seek(places[first])
        file.write(wanted.numpy().tobytes())
    before_kb = _anonymous_kb()
    loaded = load_checkpoint(path)
    assert loaded.config == ModeConfig(
        TransformerConfig(7, 10, 1024, 12, 8, goal_width=512, token_width=2048), ImageConfig("resnet50"), TextConfig()
    )
    torch.testing.assert_close(loaded.weights["denoiser.inner_model.pos_emb"], wanted, rtol=0, atol=0)
    # CLIP's text tower becomes float32; the other 3 GB stay in the file.
    assert _anonymous_kb() - before_kb < 1_000_000


def _anonymous_kb() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
