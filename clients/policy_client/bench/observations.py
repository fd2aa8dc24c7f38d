"""Observations for a load test, drawn from the served spec: random, since caches and codecs flatter zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy_client.bench.served import ServedPolicy


def draw_observations(policy: ServedPolicy, count: int, seed: int) -> list[dict[str, Any]]:
    """Return observations that fit a policy's spec.

    Images are noise, (H, W, 3) uint8, of the size that the network takes; states are normal, or even between their
    limits where the spec has some, (S,) float32; instructions are the spec's own examples.
    """
    draw = np.random.default_rng(seed)
    return [_draw(policy.spec, draw) for _ in range(count)]


def _draw(spec: Mapping[str, Any], draw: np.random.Generator) -> dict[str, Any]:
    observation: dict[str, Any] = {camera["name"]: _image(camera, draw) for camera in spec.get("cameras") or ()}
    state = spec.get("state")
    if state:
        observation["state"] = _vector(state, draw)
    goal = spec.get("goal") or {"kind": "none"}
    if goal["kind"] == "state":
        observation["goal"] = np.stack([_vector(spec["state"], draw) for _ in range(goal.get("length", 1))])
    elif goal["kind"] == "image":
        observation["goal"] = _image(goal["camera"], draw)
    elif goal["kind"] == "text":
        examples = goal.get("examples") or ("pick up the red block",)
        observation["prompt"] = str(examples[draw.integers(len(examples))])
    return observation


def _image(camera: Mapping[str, Any], draw: np.random.Generator) -> NDArray[np.uint8]:
    return draw.integers(0, 256, (camera["height"], camera["width"], 3), dtype=np.uint8)


def _vector(state: Mapping[str, Any], draw: np.random.Generator) -> NDArray[np.float32]:
    if state.get("low") and state.get("high"):
        low, high = (np.asarray(state[side], np.float64) for side in ("low", "high"))
        if np.isfinite(low).all() and np.isfinite(high).all():
            return draw.uniform(low, high).astype(np.float32)
    return draw.normal(size=len(state["names"])).astype(np.float32)
