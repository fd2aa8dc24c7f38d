"""LoRA fine-tunes of DiVLA: merged into what they were trained on."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policy_models.divla.checkpoint import read_checkpoint
from policy_models.divla.state_dict import CheckpointMismatch
from tests.unit.divla_files import (
    Change,
    Tensors,
    assert_answers,
    put,
    settings,
    small_parts,
    small_vlm,
    upstream_parts,
    upstream_vlm,
    whole,
    without,
    write_lora,
    write_policy,
)

ADAPTED = ("visual.blocks.0.attn.qkv", "visual.blocks.1.mlp.fc2", "model.layers.1.self_attn.q_proj")


def matrices(seed: int = 3, rank: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    generator, weights = torch.Generator().manual_seed(seed), upstream_vlm(small_vlm())
    shapes = {name: weights[f"{name}.weight"].shape for name in ADAPTED}
    return {
        name: (torch.randn(rank, w, generator=generator) / 6, torch.randn(h, rank, generator=generator) / 6)
        for name, (h, w) in shapes.items()
    }


def adapter(infix: str = "") -> Tensors:
    both = {name: dict(zip("AB", pair, strict=True)) for name, pair in matrices().items()}
    return {
        f"base_model.model.{name}.lora_{side}{infix}.weight": matrix
        for name, pair in both.items()
        for side, matrix in pair.items()
    }


def adapted_vlm() -> nn.Module:
    """The language model with adapters beside its layers, as it was trained: W x + 16/4 B A x."""
    vlm = small_vlm()
    for name, (A, B) in matrices().items():
        place = f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.")

        def beside(_: nn.Module, inputs: Any, output: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
            return output + 4 * inputs[0] @ A.T @ B.T

        vlm.get_submodule(place).register_forward_hook(beside)
    return vlm


def wrapped(tensors: Tensors) -> Tensors:
    return {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}


def everything() -> Tensors:
    """`non_lora_trainables.bin` at the end of a run: the weights under adapters are in it, and wrapped."""
    return wrapped(
        {re.sub(rf"^({'|'.join(ADAPTED)})\.", r"\1.base_layer.", key): tensor for key, tensor in whole().items()}
    )


@pytest.mark.parametrize("infix", ["", ".default"])
def test_a_lora_fine_tune_is_merged_into_its_base(tmp_path: Path, infix: str) -> None:
    base = write_policy(tmp_path / "qwen2_vl", upstream_vlm(small_vlm()), {}, shards=2)
    others = wrapped(upstream_parts(*small_parts()))
    loaded = read_checkpoint(write_lora(tmp_path / "run" / "lora", adapter(infix), others, settings()), base)
    assert_answers(loaded, adapted_vlm(), *small_parts())


def test_a_lora_fine_tune_that_has_all_weights_needs_no_base(tmp_path: Path) -> None:
    loaded = read_checkpoint(write_lora(tmp_path / "lora", adapter(), everything(), settings()))
    assert_answers(loaded, adapted_vlm(), *small_parts())


def test_what_was_trained_without_an_adapter_takes_the_place_of_the_base(tmp_path: Path) -> None:
    base = write_policy(tmp_path / "stage2", whole(), settings())
    newer = small_parts(seed=7)
    lora = write_lora(tmp_path / "stage3" / "lora", adapter(), wrapped(upstream_parts(*newer)), settings())
    assert_answers(read_checkpoint(lora, base), adapted_vlm(), *newer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("base_model.model.visual.blocks.0.attn.qkv.lora_B.weight"),
            "has no visual.blocks.0.attn.qkv.lora_B",
        ),
        (put("base_model.model.visual.lora_magnitude_vector", torch.ones(1)), "unknown keys: visual.lora_magnitude"),
        (put("base_model.model.model.layers.9.o.lora_A.weight", torch.ones(4, 32)), "no model.layers.9.o.lora_B"),
        (
            put("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", torch.ones(5, 32)),
            r"'model.layers.1.self_attn.q_proj' has matrices \(5, 32\) and \(32, 4\) of rank 4 for a weight \(32, 32\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_named(tmp_path: Path, change: Change, message: str) -> None:
    tensors = adapter()
    change(tensors)
    with pytest.raises(CheckpointMismatch, match=message):
        read_checkpoint(write_lora(tmp_path / "p", tensors, everything(), settings()))


def test_an_adapter_of_an_unknown_layer_says_where_it_was_sought(tmp_path: Path) -> None:
    tensors = adapter()
    for side, shape in (("A", (4, 32)), ("B", (32, 4))):
        tensors[f"base_model.model.model.layers.9.self_attn.o_proj.lora_{side}.weight"] = torch.ones(shape)
    folder = write_lora(tmp_path / "p", tensors, everything(), settings())
    with pytest.raises(CheckpointMismatch, match="'model.layers.9.self_attn.o_proj.weight', which is in non_lora"):
        read_checkpoint(folder)


def test_a_lora_fine_tune_without_its_base_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "p", adapter(), wrapped(upstream_parts(*small_parts())), settings())
    with pytest.raises(CheckpointMismatch, match="without a base to fine-tune"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_rslora": True}, "only plain LoRA is supported, here use_rslora = True"),
        ({"alpha_pattern": {"qkv": 8}}, "alpha_pattern = {'qkv': 8}"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"r": 0}, "'r' is 0"),
        ({"lora_alpha": None}, "'lora_alpha' is None"),
        ({"r": 8}, "of rank 8"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointMismatch, match=message):
        read_checkpoint(write_lora(tmp_path / "p", adapter(), everything(), settings(), **changed))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "non_lora_trainables.bin"])
def test_a_lora_fine_tune_without_one_of_its_files_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_lora(tmp_path / "p", adapter(), everything(), settings())
    (folder / name).unlink()
    with pytest.raises(CheckpointMismatch, match=f"but no {name}"):
        read_checkpoint(folder)
