"""A MoDE bundle of the released size with random weights: too large to ship, so it is written once and kept."""

from dataclasses import asdict
from itertools import islice, product
from pathlib import Path

from benchmarks.kept import kept_bundle
from benchmarks.settings import Settings
from policy_models.mode.config import ImageConfig, ModeConfig, TextConfig, TransformerConfig
from policy_models.spec import CameraSpec, GoalSpec, PolicySpec, SamplerSpec, VectorSpec
from policy_server.bundle import FORMAT, Bundle, Manifest
from policy_server.export.bundle import DEFAULT_TOLERANCE, INT8, write_bundle

# What mbreuss/MoDE_CALVIN_ABC_1 and its siblings are: 686 million parameters in the denoiser, 47 in the two image
# encoders, 63 in CLIP's text tower.
RELEASED = ModeConfig(
    TransformerConfig(action_width=7, horizon=10, width=1024, layers=12, heads=8, goal_width=512, token_width=2048),
    ImageConfig("resnet50"),
    TextConfig(),
)
# Shows that everything runs, and nothing else.
SMALL = ModeConfig(
    TransformerConfig(action_width=7, horizon=10, width=128, layers=2, heads=4, goal_width=64, token_width=128),
    ImageConfig("resnet18", channels=16),
    TextConfig(vocabulary=1000, width=64, layers=2, heads=2, projection=64),
)
_SIDE_PX, _SMALL_SIDE_PX = 224, 64
# One instruction: what it costs to read a new one is not what is measured.
_INSTRUCTION = "push the sliding door to the left side"
_INT8_TOLERANCE = 0.1
# CLIP's vocabulary before its merges: every byte, every byte at the end of a word, start and end of the text.
_UNMERGED = 514


def large_bundle(settings: Settings) -> Bundle:
    """Return the bundle, written first if it is not there or not whole; a small stand-in for `--quick`."""
    path = settings.cache / ("mode-small" if settings.quick else "mode-released")
    config, spec = (SMALL, _spec(_SMALL_SIDE_PX)) if settings.quick else (RELEASED, _spec(_SIDE_PX))
    return kept_bundle(path, config, spec, _write, "a moment" if settings.quick else "4.1 GB, some minutes")


def describe(bundle: Bundle) -> str:
    """Return what the bundle is, in words."""
    shape, count = bundle.config.transformer, sum(array.size for array in bundle.assets.weights.values())
    return (
        f"MoDE with random weights, {count / 1e6:,.0f} million of them ({bundle.size_bytes / 1e9:.2f} GB in float32): "
        f"{shape.layers} blocks of width {shape.width}, {shape.top_k} of {shape.experts} experts, "
        f"{len(bundle.spec.cameras)} cameras through {bundle.config.images.encoder}"
    )


def _spec(side_px: int) -> PolicySpec:
    return PolicySpec(
        action=VectorSpec(
            ("x", "y", "z", "roll", "pitch", "yaw", "gripper"), ("",) * 7, low=(-1.0,) * 7, high=(1.0,) * 7
        ),
        cameras=(CameraSpec("static", side_px, side_px), CameraSpec("gripper", side_px, side_px)),
        goal=GoalSpec("text", examples=(_INSTRUCTION,)),
        horizon=10,
        step_s=1 / 30,
        sampler=SamplerSpec("ddim", "exponential", steps=10, sigma_min=0.001, sigma_max=80.0),
    )


def _write(path: Path, config: ModeConfig, spec: PolicySpec) -> None:
    import torch

    from policy_models.mode.assembly import ModeNetworks
    from policy_models.mode.tokenizer import make_tokenizer

    networks = ModeNetworks(config, [camera.name for camera in spec.cameras])
    networks.materialize()
    for name, parameter in networks.named_parameters():
        if "film" in name:  # drawn as the identity, which would let the goal pass the images by
            torch.nn.init.normal_(parameter, std=0.02)
        elif "router" in name and parameter.ndim == 2:  # drawn so small that all noise levels choose alike
            torch.nn.init.normal_(parameter, std=2 / parameter.shape[1] ** 0.5)
    manifest = Manifest(
        FORMAT,
        path.name,
        "mode",
        "1",
        "Random weights.",
        "Apache-2.0",
        spec,
        asdict(config),
        {**DEFAULT_TOLERANCE, INT8: _INT8_TOLERANCE},
    )
    assert config.text is not None
    write_bundle(
        path,
        manifest,
        weights=networks.state_dict(),
        tokenizer=make_tokenizer(_made_up_merges(config.text.vocabulary)),
        gradients=False,
    )


def _made_up_merges(vocabulary: int) -> list[tuple[str, str]]:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    return list(islice(product(letters, letters), vocabulary - _UNMERGED))
