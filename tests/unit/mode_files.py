"""Writes MoDE checkpoints as they are published, small or full of holes, with weights of chance."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from policy_models.mode.config import ImageConfig, ModeConfig, TextConfig, TransformerConfig
from policy_models.mode.vision import make_encoder
from tests.unit.parity import FOLDER, parity_case

Tensors = dict[str, Tensor]
Keys = dict[str, tuple[list[int], str]]

# Every key of a released file, with its shape and dtype.
RELEASED: Keys = json.loads((FOLDER / "mode_agent_keys.json").read_text())
NETWORK, CLIP = "model.inner_model.", "language_goal.clip_rn50."

SMALL = ModeConfig(
    TransformerConfig(7, 10, 128, 2, 8, goal_width=64, token_width=256),
    ImageConfig("resnet50", 8),
    TextConfig(49408, 64, 2, 1, 77, 64),
)


def small_keys() -> Keys:
    """The released keys with 2 layers in each tower and every width an eighth (CLIP's image tower a twelfth)."""
    image_tower = {768: 64, 2304: 192, 3072: 256}
    kept = {77: 77, 49408: 49408}

    def small(n: int) -> int:
        return image_tower.get(n) or kept.get(n) or (n // 8 if n >= 64 else n)

    return {
        key: ([small(n) for n in shape], dtype)
        for key, (shape, dtype) in RELEASED.items()
        if not re.search(r"blocks\.([2-9]|1\d)\.", key)
    }


def with_encoder(encoder: str) -> Keys:
    """The same with another image encoder: its keys as upstream's module has them, or as timm's network has them."""
    kept = {key: value for key, value in small_keys().items() if "_resnet." not in key}
    if encoder == "resnet18":
        published = parity_case("mode_film_resnet18").about["keys"]
        own = {key: ([n // 8 if n >= 64 else n for n in shape], dtype) for key, (shape, dtype) in published.items()}
    else:
        module = make_encoder(ImageConfig("resnet34", 8), 64)
        own = {key: (list(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in module.state_dict().items()}
    encoders = {f"{camera}_resnet.{key}": value for camera in ("static", "gripper") for key, value in own.items()}
    return kept | encoders | {f"{NETWORK}tok_emb.weight": ([128, 64], "float32")}


def with_shared_expert() -> Keys:
    """The same with a shared expert in the place of the fourth."""
    keys = {key.replace("experts.expert_3.", "shared_mlp."): value for key, value in small_keys().items()}
    for key, (shape, dtype) in list(keys.items()):
        if "router.mlp.3." in key:
            keys[key] = ([3, *shape[1:]], dtype)
    return keys


def drawn(keys: Keys, seed: int = 0) -> Tensors:
    """Random weights whose answers are neither all alike nor enormous."""
    generator = torch.Generator().manual_seed(seed)

    def draw(key: str, shape: list[int], dtype: str) -> Tensor:
        n = torch.randn(shape, generator=generator)
        if dtype == "int64":
            return torch.tensor(1000)
        if key.endswith("running_var") or (len(shape) == 1 and key.endswith(("weight", ".g"))):
            return (1 + 0.1 * n.abs()).to(getattr(torch, dtype))
        return (n / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1 * n).to(getattr(torch, dtype))

    return {key: draw(key, *value) for key, value in keys.items()}


def write(folder: Path, tensors: Tensors, name: str = "model_cleaned.safetensors") -> Path:
    path = folder / name
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save({"state_dict": tensors}, path)
    return path


def write_holes(path: Path, keys: Keys) -> dict[str, int]:
    """Write a safetensors file of zeros that takes no space on the disk; return where each tensor begins."""
    sizes = {"float32": ("F32", 4), "float16": ("F16", 2), "int64": ("I64", 8)}
    header: dict[str, Any] = {}
    offset = 0
    for key, (shape, dtype) in keys.items():
        name, size = sizes[dtype]
        end = offset + size * math.prod(shape)
        header[key] = {"dtype": name, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return {key: 8 + len(text) + entry["data_offsets"][0] for key, entry in header.items()}
