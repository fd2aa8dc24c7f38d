"""Makes a bundle of a public MoDE checkpoint."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from policy_models.mode.checkpoint import GoalTower, load_checkpoint
from policy_models.mode.config import ModeConfig
from policy_models.mode.state_dict import CheckpointMismatch
from policy_models.mode.tokenizer import make_tokenizer, read_merges
from policy_models.spec import CameraSpec, GoalSpec, PolicySpec, SamplerSpec, VectorSpec
from policy_server.bundle import FORMAT, Bundle, Manifest
from policy_server.errors import BundleInvalid
from policy_server.export.bundle import DEFAULT_TOLERANCE, write_bundle
from policy_server.export.cameras import read_camera

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """What a released policy was trained with, and its file does not say.

    Attributes:
        cameras: What `static_resnet` and `gripper_resnet` see, in this order.
        step_s: Time between two actions.
        examples: Some of the instructions.
    """

    cameras: tuple[CameraSpec, CameraSpec]
    step_s: float
    examples: tuple[str, ...]


# Upstream resizes with torchvision's antialiased bilinear filter. Where that enlarges, as it does both of CALVIN's
# images (200 and 84 pixels a side), OpenCV's "linear" is within one grey level of it. LIBERO's wrist image is shrunk,
# from 128 pixels or from 224; of OpenCV's rules "area" then comes nearest, and a client that wants it exact sends 112.
BENCHMARKS: Mapping[str, Benchmark] = {
    "calvin": Benchmark(
        (CameraSpec("rgb_static", 224, 224, "linear"), CameraSpec("rgb_gripper", 224, 224, "linear")),
        step_s=1 / 30,
        examples=(
            "pull the handle to open the drawer",
            "push the sliding door to the left side",
            "use the switch to turn on the light bulb",
            "grasp and lift the red block",
        ),
    ),
    "libero": Benchmark(
        (CameraSpec("static", 224, 224, "linear"), CameraSpec("wrist", 112, 112, "area")),
        step_s=1 / 20,
        examples=(
            "put both the alphabet soup and the tomato sauce in the basket",
            "turn on the stove and put the moka pot on it",
        ),
    ),
}

# Relative motion of the end effector, each number scaled to [-1, 1] by the robot's own controller.
_ACTION = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_SIGMA_MAX = 80.0


def import_checkpoint(
    checkpoint: Path,
    *,
    output: Path,
    vocabulary: Path | None,
    benchmark: str = "calvin",
    cameras: Sequence[str] = (),
    goal: GoalTower = "text",
    steps: int = 10,
    sigma_min: float = 0.001,
    step_s: float | None = None,
    top_k: int = 2,
    noise_token: bool = True,
    goal_routing: bool = False,
    sigma_data: float = 0.5,
    licence: str = "MIT",
    gradients: bool = True,
) -> Bundle:
    """Write a bundle that acts as upstream's agent does with the same checkpoint.

    Args:
        checkpoint: See `load_checkpoint`, which has `goal` and everything from `top_k` to `sigma_data` from here.
        output: The folder to make; its name is the policy's.
        vocabulary: CLIP's merges, see `read_merges`; None if goals are images.
        benchmark: A name from `BENCHMARKS`.
        cameras: Two, as `read_camera` reads them, instead of the benchmark's.
        goal: What a robot is told: an instruction, or an image of where to get.
        steps: Denoising steps.
        sigma_min: Lowest positive noise level.
        step_s: Time between two actions, instead of the benchmark's.
        licence: SPDX identifier of the weights' licence.
        gradients: Whether the bundle gets the denoiser's gradient, for real-time chunking.

    Raises:
        BundleInvalid: A file cannot be read or does not fit the others; the message says which and how.
    """
    preset = _benchmark(benchmark)
    static, gripper = _cameras(cameras) if cameras else preset.cameras
    if not 0 < sigma_min <= _SIGMA_MAX:
        raise BundleInvalid(f"the lowest noise level is {sigma_min}, expected more than 0 and at most {_SIGMA_MAX}")
    tokenizer = _tokenizer(vocabulary) if goal == "text" else None
    logger.info("reading %s", checkpoint)
    try:
        loaded = load_checkpoint(
            checkpoint,
            cameras=(static.name, gripper.name),
            goal=goal,
            top_k=top_k,
            noise_token=noise_token,
            goal_routing=goal_routing,
            sigma_data=sigma_data,
        )
    except (CheckpointMismatch, OSError) as error:
        raise BundleInvalid(str(error)) from error
    config = loaded.config
    logger.info("found %s", _described(config))
    if tokenizer and config.text and Tokenizer.from_str(tokenizer).get_vocab_size() != config.text.vocabulary:
        raise BundleInvalid(f"{vocabulary} does not fit a language model of {config.text.vocabulary} tokens")
    manifest = Manifest(
        format=FORMAT,
        name=output.name,
        family="mode",
        version="1",
        description=f"MoDE ({_described(config)}), imported from {checkpoint.name}.",
        licence=licence,
        spec=PolicySpec(
            cameras=(static, gripper),
            action=_action(config.transformer.action_width),
            goal=_goal(config, preset),
            horizon=config.transformer.horizon,
            step_s=step_s or preset.step_s,
            sampler=SamplerSpec("ddim", "exponential", steps, sigma_min, _SIGMA_MAX),
        ),
        config=asdict(config),
        tolerance=dict(DEFAULT_TOLERANCE),
        provenance={"imported_from": checkpoint.name, "benchmark": benchmark},
    )
    return write_bundle(output, manifest, weights=loaded.weights, tokenizer=tokenizer, gradients=gradients)


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise BundleInvalid(f"there is no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _cameras(texts: Sequence[str]) -> tuple[CameraSpec, CameraSpec]:
    if len(texts) != 2:
        raise BundleInvalid(f"a MoDE policy sees through 2 cameras, static and gripper in this order; got {len(texts)}")
    static, gripper = (read_camera(text, "linear") for text in texts)
    if static.name == gripper.name:
        raise BundleInvalid(f"two cameras share the name {static.name!r}")
    if "." in static.name + gripper.name:
        raise BundleInvalid(f"a camera of a MoDE policy has no dot in its name, got {static.name} and {gripper.name}")
    return static, gripper


def _tokenizer(vocabulary: Path | None) -> str:
    if vocabulary is None:
        raise BundleInvalid(
            "instructions need CLIP's vocabulary: bpe_simple_vocab_16e6.txt.gz of openai/CLIP, or the merges.txt of "
            "openai/clip-vit-base-patch32"
        )
    try:
        return make_tokenizer(read_merges(vocabulary))
    except ValueError as error:
        raise BundleInvalid(str(error)) from error


def _action(width: int) -> VectorSpec:
    names = _ACTION if width == len(_ACTION) else tuple(f"a{i}" for i in range(width))
    return VectorSpec(names, ("",) * width, (-1.0,) * width, (1.0,) * width)


def _goal(config: ModeConfig, preset: Benchmark) -> GoalSpec:
    if config.vision is None:
        return GoalSpec("text", examples=preset.examples)
    side = config.vision.image
    return GoalSpec("image", camera=CameraSpec("goal", side, side, "linear"))


def _described(config: ModeConfig) -> str:
    shape = config.transformer
    shared = " and a shared one" if shape.shared_expert else ""
    return f"{shape.layers} layers, width {shape.width}, {shape.experts} experts{shared}, {config.images.encoder}"
