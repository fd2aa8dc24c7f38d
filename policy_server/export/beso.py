"""Makes a bundle of a public BESO checkpoint."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from policy_models.beso.checkpoint import CheckpointMismatch, load_checkpoint, read_hydra_config
from policy_models.normalizer import Normalizer, Statistics
from policy_models.spec import GoalSpec, PolicySpec, SamplerSpec, VectorSpec
from policy_server.bundle import FORMAT, Bundle, Manifest
from policy_server.errors import BundleInvalid
from policy_server.export.bundle import DEFAULT_TOLERANCE, write_bundle


def import_checkpoint(
    checkpoint: Path,
    *,
    statistics: Path,
    hydra_config: Path,
    output: Path,
    schedule: str,
    step_s: float,
    zeroed_goal_dims: tuple[int, ...],
    licence: str,
    gradients: bool = True,
) -> Bundle:
    """Write a bundle that acts as upstream's agent does with the same checkpoint.

    Raises:
        BundleInvalid: A file cannot be read or does not fit the others; the message says which and how.
    """
    try:
        run = read_hydra_config(yaml.safe_load(_text(hydra_config)))
        loaded = load_checkpoint(checkpoint, heads=run["heads"], sigma_data=run["sigma_data"])
    except (CheckpointMismatch, yaml.YAMLError, FileNotFoundError) as error:
        raise BundleInvalid(str(error)) from error
    config = replace(loaded.config, zeroed_goal_dims=zeroed_goal_dims)
    state, action = _statistics(statistics)
    scaling: Any = ("minmax" if run["minmax"] else "zscore") if run["scaled"] else "none"
    normalizer = Normalizer(state, action, "zscore" if run["scaled"] else "none", scaling)
    low, high = normalizer.action_limits()
    manifest = Manifest(
        format=FORMAT,
        name=output.name,
        family="beso",
        version="1",
        description=f"BESO, imported from {checkpoint.name}.",
        licence=licence,
        spec=PolicySpec(
            state=_unnamed("s", config.state_width),
            # Upstream's agent clips to these, so they are what this policy can ask for.
            action=replace(_unnamed("a", config.action_width), low=low, high=high),
            goal=GoalSpec("state", config.goal_length) if config.goal_length else GoalSpec(),
            horizon=1,
            step_s=step_s,
            window=config.window,
            sampler=SamplerSpec(
                sampler=run["sampler"],
                schedule=schedule,
                steps=run["steps"],
                sigma_min=run["sigma_min"],
                sigma_max=run["sigma_max"],
                rho=run["rho"],
                guidance=run["guidance"],
            ),
        ),
        config=asdict(config),
        tolerance=dict(DEFAULT_TOLERANCE),
        provenance={
            "imported_from": checkpoint.name,
            "configuration": hydra_config.name,
            "statistics": statistics.name,
        },
    )
    return write_bundle(output, manifest, normalizer=normalizer, weights=loaded.weights, gradients=gradients)


def _statistics(path: Path) -> tuple[Statistics, Statistics]:
    try:
        both = TypeAdapter(dict[str, Statistics]).validate_python(json.loads(_text(path)))
        return both["state"], both["action"]
    except (ValidationError, ValueError) as error:
        raise BundleInvalid(f"{path} holds no statistics: {error}") from error
    except KeyError as error:
        raise BundleInvalid(f"{path} has no entry {error}; it needs 'state' and 'action'") from error


def _unnamed(letter: str, width: int) -> VectorSpec:
    # A checkpoint does not say what its numbers mean; the bundle's owner may name them in policy.yaml.
    return VectorSpec(tuple(f"{letter}{i}" for i in range(width)), ("",) * width)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleInvalid(f"{path} cannot be read: {error}") from error
