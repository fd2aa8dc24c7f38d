"""Bundles that exist for measuring alone: one policy that costs nothing, one that is slow."""

from dataclasses import asdict
from pathlib import Path

from benchmarks.payload import CAMERAS, HORIZON, IMAGE_PX, JOINTS
from policy_models.beso.config import BesoConfig
from policy_models.normalizer import Normalizer, Statistics
from policy_models.spec import GoalSpec, PolicySpec, SamplerSpec, VectorSpec
from policy_server.bundle import FORMAT, Manifest
from policy_server.export.bundle import DEFAULT_TOLERANCE, write_bundle
from policy_server.export.hold import make_hold_bundle

_JOINTS = VectorSpec(tuple(f"joint_{i}" for i in range(JOINTS)), ("rad",) * JOINTS)


def write_hold(path: Path) -> Path:
    """Write a policy with two cameras and no network, so that only the way to it and back takes time."""
    make_hold_bundle(
        path,
        joints=_JOINTS.names,
        unit="rad",
        cameras=[f"{name}:{IMAGE_PX}x{IMAGE_PX}" for name in CAMERAS],
        horizon=HORIZON,
        step_s=0.05,
    )
    return path


def write_slow(path: Path) -> Path:
    """Write a BESO network of 19 million random weights, which a request makes as slow as it likes through `steps`."""
    import torch

    from policy_models.beso.network import make_denoiser

    torch.manual_seed(0)
    config = BesoConfig(state_width=JOINTS, action_width=JOINTS, width=512, layers=6, heads=8, horizon=64)
    statistics = Statistics((0.0,) * JOINTS, (1.0,) * JOINTS, (-1.0,) * JOINTS, (1.0,) * JOINTS)
    spec = PolicySpec(
        action=_JOINTS,
        state=_JOINTS,
        goal=GoalSpec("state", required=False),
        horizon=config.horizon,
        step_s=0.05,
        sampler=SamplerSpec("ddim", "exponential", steps=10, sigma_min=0.05, sigma_max=1.0),
    )
    manifest = Manifest(
        FORMAT, "slow", "beso", "1", "Random weights.", "Apache-2.0", spec, asdict(config), dict(DEFAULT_TOLERANCE)
    )
    write_bundle(
        path,
        manifest,
        normalizer=Normalizer(statistics, statistics),
        weights=make_denoiser(config).state_dict(),
        gradients=False,
    )
    return path
