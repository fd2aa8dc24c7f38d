"""Makes a bundle of a DiVLA or DexVLA checkpoint as upstream's training leaves it."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from policy_models.diffusion.schedules import SCHEDULES, NoiseLevels
from policy_models.divla.checkpoint import read_checkpoint
from policy_models.divla.config import DivlaConfig, ScaleDpConfig
from policy_models.divla.prompt import Template, Vocabulary
from policy_models.divla.state_dict import CheckpointMismatch
from policy_models.divla.tokenizer import read_tokenizer
from policy_models.spec import CameraSpec, GoalSpec, PolicySpec, ReasoningSpec, SamplerSpec, VectorSpec
from policy_server.bundle import FORMAT, Bundle, Manifest
from policy_server.errors import BundleInvalid
from policy_server.export.bundle import DEFAULT_TOLERANCE, write_bundle
from policy_server.export.cameras import read_camera

logger = logging.getLogger(__name__)

# Upstream trains on 320x240, which its image processor turns into whole tokens of 28x28 pixels: 308x252.
CAMERAS = ("top:308x252", "left_wrist:308x252", "right_wrist:308x252")
CROP = 0.95  # of upstream's evaluation, and on average of its augmentation
STEP_S = 0.02  # ALOHA's 50 Hz (DT in upstream's constants.py)
_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
# Two arms of six joints and a gripper: what 14 numbers are unless somebody says otherwise.
ALOHA = tuple(
    name for side in ("left", "right") for name in (*(f"{side}_{joint}:rad" for joint in _JOINTS), f"{side}_gripper")
)
_TOKENIZERS = ("tokenizer.json", "vocab.json")


def import_checkpoint(
    checkpoint: Path,
    *,
    output: Path,
    base: Path | None = None,
    tokenizer: Path | None = None,
    cameras: Sequence[str] = CAMERAS,
    crop: float = CROP,
    state: Sequence[str] = (),
    action: Sequence[str] = (),
    step_s: float = STEP_S,
    instructions: Sequence[str] = (),
    steps: int = 10,
    reasoning_tokens: int = 256,
    licence: str = "Apache-2.0",
    gradients: bool = True,
) -> Bundle:
    """Write a bundle that reasons and acts as upstream's policy does with the same checkpoint.

    Args:
        checkpoint: Folder of a full or a LoRA fine-tune, see `read_checkpoint`.
        output: The folder to make; its name is the policy's.
        base: What a LoRA fine-tune adds to.
        tokenizer: See `read_tokenizer`; looked for with the checkpoint, above it and with the base unless given.
        cameras: As `read_camera` reads them, in the order of training, all of one size.
        crop: Fraction of height and width around the centre of every image that is kept before resizing.
        state: Its numbers as "name:unit" or "name"; ALOHA's if there are 14 and none are given.
        action: Likewise.
        step_s: Time between two actions.
        instructions: Some that it was trained to follow.
        steps: Denoising steps.
        reasoning_tokens: The most tokens of one reasoning.
        licence: SPDX identifier of the weights' licence.
        gradients: Whether the bundle gets the denoiser's gradient, for real-time chunking.

    Raises:
        BundleInvalid: A file cannot be read or does not fit the others; the message says which and how.
    """
    if not checkpoint.is_dir():
        raise BundleInvalid(f"{checkpoint} is not a folder; a checkpoint has weights and config.json in one")
    seen = _cameras(cameras, crop)
    sampler = _sampler(steps)
    reasoning = ReasoningSpec(reasoning_tokens)
    tokens = _tokenizer(tokenizer, checkpoint, base)
    logger.info("reading %s", checkpoint)
    try:
        loaded = read_checkpoint(checkpoint, base)
    except (CheckpointMismatch, OSError) as error:
        raise BundleInvalid(str(error)) from error
    config = replace(loaded.config, reasoning_tokens=reasoning_tokens)
    logger.info("found %s", _described(config))
    _check_prompts(tokens, config, seen, instructions)
    low, high = loaded.statistics.action_limits()
    try:
        spec = PolicySpec(
            cameras=seen,
            state=_vector("state", state, config.state_width),
            # The head's clean actions are clipped to these, so they are what this policy can ask for.
            action=replace(_vector("action", action, config.action_width), low=low, high=high),
            goal=GoalSpec("text", examples=tuple(instructions)),
            horizon=config.horizon,
            step_s=step_s,
            sampler=sampler,
            reasoning=reasoning,
        )
    except ValueError as error:
        raise BundleInvalid(str(error)) from error
    manifest = Manifest(
        format=FORMAT,
        name=output.name,
        family="divla",
        version="1",
        description=f"DiVLA ({_described(config)}), imported from {checkpoint.name}.",
        licence=licence,
        spec=spec,
        config=asdict(config),
        tolerance=dict(DEFAULT_TOLERANCE),
        provenance={"imported_from": checkpoint.name, **({"base": base.name} if base else {})},
    )
    return write_bundle(
        output,
        manifest,
        normalizer=loaded.statistics,
        weights=loaded.weights,
        tokenizer=tokens,
        gradients=gradients,
    )


def _cameras(texts: Sequence[str], crop: float) -> tuple[CameraSpec, ...]:
    cameras = [read_camera(text, "area") for text in texts]
    names = [camera.name for camera in cameras]
    sizes = {f"{camera.width}x{camera.height}" for camera in cameras}
    if len(set(names)) != len(names):
        raise BundleInvalid(f"two cameras share a name: {', '.join(names)}")
    if len(sizes) != 1:
        raise BundleInvalid(f"all cameras of a DiVLA policy have one size, got {', '.join(sorted(sizes))}")
    try:
        return tuple(replace(camera, crop=crop) for camera in cameras)
    except ValueError as error:
        raise BundleInvalid(str(error)) from error


def _sampler(steps: int) -> SamplerSpec:
    sampler = SamplerSpec("ddim_clipped", "squaredcos", steps, sigma_min=0.01, sigma_max=100.0)
    try:
        SCHEDULES[sampler.schedule](steps, NoiseLevels(sampler.sigma_min, sampler.sigma_max, sampler.rho))
    except ValueError as error:
        raise BundleInvalid(str(error)) from error
    return sampler


def _tokenizer(named: Path | None, checkpoint: Path, base: Path | None) -> str:
    places = [checkpoint, checkpoint.absolute().parent, *([base] if base else [])]
    path = named or next((p for p in places if any((p / file).exists() for file in _TOKENIZERS)), None)
    if path is None:
        raise BundleInvalid(
            f"no tokenizer.json, and no vocab.json with merges.txt, is in {', '.join(map(str, places))}; name the "
            "folder of the Qwen2-VL that was fine-tuned, whose tokenizer it is: --tokenizer"
        )
    try:
        return read_tokenizer(path)
    except ValueError as error:
        raise BundleInvalid(str(error)) from error


def _check_prompts(
    tokenizer: str, config: DivlaConfig, seen: Sequence[CameraSpec], instructions: Sequence[str]
) -> None:
    """Raise BundleInvalid unless images and instructions make prompts that the language model can read."""
    height, width = seen[0].height, seen[0].width
    side = config.eyes.patch * config.eyes.merge
    if height % side or width % side:
        near = "x".join(str(max(round(pixels / side), 1) * side) for pixels in (width, height))
        raise BundleInvalid(
            f"images of {width}x{height} pixels are not made of tokens of {side}x{side}; the nearest size is {near}"
        )
    try:
        template = Template(Vocabulary(tokenizer), config, images=len(seen), height=height, width=width)
        for instruction in instructions or ("go",):
            template.write(instruction)
    except ValueError as error:
        raise BundleInvalid(str(error)) from error


def _vector(what: str, texts: Sequence[str], width: int) -> VectorSpec:
    if not texts:
        texts = ALOHA if width == len(ALOHA) else [f"{what[0]}{i}" for i in range(width)]
    if len(texts) != width:
        raise BundleInvalid(f"the {what} of this policy has {width} numbers, and {len(texts)} are named")
    pairs = [text.partition(":") for text in texts]
    return VectorSpec(tuple(name for name, _, _ in pairs), tuple(unit for _, _, unit in pairs))


def _described(config: DivlaConfig) -> str:
    language, head = config.language, config.head
    if isinstance(head, ScaleDpConfig):
        shape = f"ScaleDP of {head.layers} layers and width {head.width}"
    else:
        shape = f"UNet of widths {', '.join(map(str, head.widths))}"
    return f"language model of {language.layers} layers and width {language.width}, {shape}"
