"""Public MoDE checkpoints, key by key.

A released file is the state dict of upstream's whole agent: denoiser, two image encoders and CLIP, float32 and float16
mixed. Its keys and shapes tell the configuration, but for what `load_checkpoint` takes as arguments.
"""

from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from policy_models.mode.config import ImageConfig, ModeConfig, TextConfig, TransformerConfig, VisionConfig
from policy_models.mode.goals import image_tower, text_tower
from policy_models.mode.network import ModeDiT
from policy_models.mode.state_dict import COUNTER, CheckpointMismatch, find_file, read_state_dict
from policy_models.mode.vision import make_encoder, token_width

GoalTower = Literal["text", "image"]
_Shapes = dict[str, tuple[int, ...]]

_NETWORK = "model.inner_model."
_STATIC, _GRIPPER = "static_resnet.", "gripper_resnet."
_CLIP = "language_goal.clip_rn50."  # whatever its backbone is
_VISUAL = f"{_CLIP}visual."
# Upstream stores these and never reads them.
_UNUSED = frozenset({f"{_NETWORK}gripper_embed.weight", f"{_CLIP}logit_scale"})
_CLIP_HEAD = 64
_LISTED = 8


@dataclass(frozen=True)
class Checkpoint:
    """Weights under the names that a bundle stores them by, and the shape read from them.

    Attributes:
        config: The shape of the whole policy.
        weights: float32, but for the counters of batch norms. Those that are float32 in the file are read from it when
            they are used: it must stay where it is.
    """

    config: ModeConfig
    weights: dict[str, Tensor]


def load_checkpoint(
    path: Path,
    *,
    cameras: tuple[str, str] = ("static", "gripper"),
    goal: GoalTower = "text",
    top_k: int = 2,
    noise_token: bool = True,
    goal_routing: bool = False,
    sigma_data: float = 0.5,
) -> Checkpoint:
    """Load a public checkpoint safely (no code in it is ever run).

    Args:
        path: A released file, a training run's checkpoint, or a folder with a released file in it.
        cameras: What to call the images that `static_resnet` and `gripper_resnet` encode.
        goal: Which of CLIP's towers embeds the goals; the other is left out.
        top_k: Experts that serve a noise level, as upstream counts them: a shared expert is one of them.
        noise_token: Whether the noise level is also a token.
        goal_routing: Whether the goal takes part in the choice of experts.
        sigma_data: Of the preconditioning; 0.5 in every public run.

    Raises:
        CheckpointMismatch: Keys or shapes do not make a MoDE policy; the message lists them.
        OSError: The file cannot be read.
    """
    file = find_file(path)
    tensors = read_state_dict(file)
    _refuse_others(file.name, list(tensors))
    shapes: _Shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    try:
        config = _read_config(shapes, goal, top_k)
        settled = replace(config.transformer, noise_token=noise_token, goal_routing=goal_routing, sigma_data=sigma_data)
        config = replace(config, transformer=settled)
    except KeyError as error:
        raise CheckpointMismatch(f"{file.name} has no tensor {error}, which would tell its shape") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointMismatch(f"the shape of {file.name} cannot be read from its keys: {error}") from error
    used = {key: tensor for key, tensor in tensors.items() if not _is_unused(key, goal)}
    _compare(file.name, config, {key: shapes[key] for key in used}, _expected(config))
    quantized = sorted(key for key, t in used.items() if not t.is_floating_point() and not key.endswith(COUNTER))
    if quantized:
        raise CheckpointMismatch(
            f"{file.name} has whole numbers for weights, it may be quantized: {_listed(quantized)}"
        )
    return Checkpoint(config, _renamed(used, config, cameras))


def _refuse_others(name: str, keys: list[str]) -> None:
    if f"{_NETWORK}sigma_linear.weight" not in keys:
        beso = any(key.endswith(("action_pred.weight", "action_pred.0.weight")) for key in keys)
        what = "a BESO network, which has an import of its own" if beso else "no MoDE agent"
        raise CheckpointMismatch(f"{name} holds {what}; its keys are {_listed(keys)}")
    if f"{_NETWORK}state_embed.weight" in keys:
        raise CheckpointMismatch(
            f"{name} was trained to see the robot's state ({_NETWORK}state_embed.weight), which upstream's own code "
            "cannot run; such policies are not supported"
        )


def _is_unused(key: str, goal: GoalTower) -> bool:
    other_tower = key.startswith(_CLIP) and key.startswith(_VISUAL) != (goal == "image")
    return key in _UNUSED or other_tower


def _read_config(shapes: _Shapes, goal: GoalTower, top_k: int) -> ModeConfig:
    images = _read_images(shapes)
    text = _read_text(shapes) if goal == "text" else None
    vision = _read_vision(shapes) if goal == "image" else None
    tower = text or vision
    assert tower is not None
    _, positions, width = shapes[f"{_NETWORK}pos_emb"]
    (head_width,) = shapes[f"{_NETWORK}blocks.0.attn.q_norm.g"]
    (action_width,) = shapes[f"{_NETWORK}out.bias"]
    (experts,) = shapes[f"{_NETWORK}blocks.0.router.router.mlp.3.bias"]
    shared = f"{_NETWORK}blocks.0.shared_mlp.mlp.2.weight" in shapes
    transformer = TransformerConfig(
        action_width=action_width,
        horizon=positions - 1,
        width=width,
        layers=_count(shapes, f"{_NETWORK}blocks."),
        heads=width // head_width,
        goal_width=tower.projection,
        token_width=token_width(images),
        experts=experts,
        top_k=top_k - shared,
        shared_expert=shared,
    )
    return ModeConfig(transformer, images, text, vision)


def _read_images(shapes: _Shapes) -> ImageConfig:
    if f"{_STATIC}film_module1.modulation.1.weight" in shapes:
        return ImageConfig("resnet18", shapes[f"{_STATIC}conv1.weight"][0])
    bottlenecks = f"{_STATIC}resnet.layer1.0.conv3.weight" in shapes
    return ImageConfig("resnet50" if bottlenecks else "resnet34", shapes[f"{_STATIC}resnet.conv1.weight"][0])


def _read_text(shapes: _Shapes) -> TextConfig:
    vocabulary, width = shapes[f"{_CLIP}token_embedding.weight"]
    context, _ = shapes[f"{_CLIP}positional_embedding"]
    _, projection = shapes[f"{_CLIP}text_projection"]
    layers = _count(shapes, f"{_CLIP}transformer.resblocks.")
    return TextConfig(vocabulary, width, layers, _clip_heads(width), context, projection)


def _read_vision(shapes: _Shapes) -> VisionConfig:
    if f"{_VISUAL}attnpool.c_proj.weight" in shapes:
        raise ValueError("goal images need a CLIP whose image tower is a transformer; here it is a ResNet")
    width, _, patch, _ = shapes[f"{_VISUAL}conv1.weight"]
    positions, _ = shapes[f"{_VISUAL}positional_embedding"]
    _, projection = shapes[f"{_VISUAL}proj"]
    layers = _count(shapes, f"{_VISUAL}transformer.resblocks.")
    return VisionConfig(patch * isqrt(positions - 1), patch, width, layers, _clip_heads(width), projection)


def _count(shapes: _Shapes, prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})


def _clip_heads(width: int) -> int:
    if width % _CLIP_HEAD:
        raise ValueError(f"a tower of CLIP is {width} wide, which is no number of heads of {_CLIP_HEAD}")
    return width // _CLIP_HEAD


def _expected(config: ModeConfig) -> _Shapes:
    """Return the shape of every tensor that such a policy has, by upstream's names."""
    with torch.device("meta"):
        network = ModeDiT(config.transformer)
        encoder = make_encoder(config.images, config.transformer.goal_width)
    shapes: _Shapes = {}
    for prefix, module in ((_NETWORK, network), (_STATIC, encoder), (_GRIPPER, encoder)):
        shapes |= {f"{prefix}{key}": tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    if config.text:
        width = config.text.width
        shapes |= _tower_shapes(_CLIP, config.text.layers, width) | {
            f"{_CLIP}token_embedding.weight": (config.text.vocabulary, width),
            f"{_CLIP}positional_embedding": (config.text.context, width),
            f"{_CLIP}text_projection": (width, config.text.projection),
            f"{_CLIP}ln_final.weight": (width,),
            f"{_CLIP}ln_final.bias": (width,),
        }
    if config.vision:
        width, patch = config.vision.width, config.vision.patch
        shapes |= _tower_shapes(_VISUAL, config.vision.layers, width) | {
            f"{_VISUAL}class_embedding": (width,),
            f"{_VISUAL}positional_embedding": ((config.vision.image // patch) ** 2 + 1, width),
            f"{_VISUAL}conv1.weight": (width, 3, patch, patch),
            f"{_VISUAL}proj": (width, config.vision.projection),
            **{f"{_VISUAL}{norm}.{part}": (width,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")},
        }
    return shapes


def _tower_shapes(prefix: str, layers: int, width: int) -> _Shapes:
    block = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
        **{f"{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")},
    }
    return {f"{prefix}transformer.resblocks.{i}.{key}": shape for i in range(layers) for key, shape in block.items()}


def _compare(name: str, config: ModeConfig, got: _Shapes, wanted: _Shapes) -> None:
    missing = sorted(wanted.keys() - got.keys())
    unexpected = sorted(got.keys() - wanted.keys())
    misshapen = [f"{k} {got[k]}, expected {wanted[k]}" for k in sorted(wanted) if k in got and got[k] != wanted[k]]
    if missing or unexpected or misshapen:
        shape = config.transformer
        raise CheckpointMismatch(
            f"{name} does not fit a MoDE of {shape.layers} layers, width {shape.width}, {shape.experts} experts and "
            f"{config.images.encoder}:\n  missing: {_listed(missing)}\n  unexpected: {_listed(unexpected)}"
            f"\n  wrong shape: {_listed(misshapen)}"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "nothing") + more


def _renamed(tensors: dict[str, Tensor], config: ModeConfig, cameras: tuple[str, str]) -> dict[str, Tensor]:
    """Return tensors under the names that `ModeNetworks` gives them, as float32."""
    static, gripper = cameras
    weights = {
        **_moved(tensors, _NETWORK, "denoiser.inner_model."),
        **_moved(tensors, _STATIC, f"perceive.encoders.{static}."),
        **_moved(tensors, _GRIPPER, f"perceive.encoders.{gripper}."),
    }
    clip = _moved(tensors, _CLIP, "")
    weights |= _moved(text_tower(clip), "", "language.") if config.text else {}
    weights |= _moved(image_tower(clip), "", "look_at_goal.") if config.vision else {}
    return {key: t.float().contiguous() if t.is_floating_point() else t for key, t in weights.items()}


def _moved(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {target + key.removeprefix(source): t for key, t in tensors.items() if key.startswith(source)}
