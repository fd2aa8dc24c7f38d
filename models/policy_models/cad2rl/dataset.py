"""Views of simulated spaces, with what flying each way came to, as batches to learn from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy_models.directions import CollisionSpec

_ARRAYS = ("images", "free", "bins", "collided", "spec")


@dataclass(frozen=True)
class Batch:
    """Some views.

    Attributes:
        images: (B, px, px, 3) uint8.
        free: Whether the first metre of each direction is free, (B, rows, columns) float32.
        bins: Rows and columns of the K directions tried, (B, K, 2) int64.
        collided: Discounted probability of a collision after trying each, (B, K) float32.
    """

    images: Tensor
    free: Tensor
    bins: Tensor
    collided: Tensor


class Views:
    """Views as `policy_sim.flights_views` writes them, or some of them."""

    def __init__(self, arrays: Mapping[str, np.ndarray], rows: np.ndarray | None = None) -> None:
        """Check that they fit each other; raises ValueError if not."""
        if missing := [name for name in _ARRAYS if name not in arrays]:
            raise ValueError(f"these are no views: {', '.join(missing)} missing among {', '.join(arrays) or 'nothing'}")
        self.settings: dict[str, Any] = json.loads(str(arrays["spec"]))
        self._arrays = {name: np.asarray(arrays[name]) for name in _ARRAYS[:-1]}
        self.directions = CollisionSpec(
            camera=self.settings["camera"],
            rows=self.settings["rows"],
            columns=self.settings["columns"],
            fov_deg=(self.settings["fov_deg"][0], self.settings["fov_deg"][1]),
            reach_m=self.settings["reach_m"],
        )
        count, px = len(self._arrays["images"]), self.settings["px"]
        grid = (self.directions.rows, self.directions.columns)
        tried = self._arrays["bins"].shape[1:2]
        wanted = {"images": (px, px, 3), "free": grid, "bins": (*tried, 2), "collided": tried}
        for name, shape in wanted.items():
            if self._arrays[name].shape != (count, *shape):
                raise ValueError(f"{name!r} has shape {self._arrays[name].shape}, expected {(count, *shape)}")
        self.rows = np.arange(count) if rows is None else rows

    def __len__(self) -> int:
        """How many views."""
        return len(self.rows)

    def split(self, held_out: int) -> tuple["Views", "Views"]:
        """Return all but the last `held_out` views, and those: they come from spaces of their own."""
        whole = {**self._arrays, "spec": np.array(json.dumps(self.settings))}
        return Views(whole, self.rows[:-held_out]), Views(whole, self.rows[-held_out:])

    def draw(self, count: int, rng: np.random.Generator) -> Batch:
        """Draw views with replacement, each mirrored or not, under other light and with noise."""
        batch = self.batch(rng.choice(self.rows, count))
        turned = torch.from_numpy(rng.random(count) < 0.5)
        mirrored = mirror(batch)
        images = torch.where(turned[:, None, None, None], mirrored.images, batch.images)
        return Batch(
            images=relight(images, rng),
            free=torch.where(turned[:, None, None], mirrored.free, batch.free),
            bins=torch.where(turned[:, None, None], mirrored.bins, batch.bins),
            collided=batch.collided,
        )

    def batch(self, rows: np.ndarray) -> Batch:
        """Return the views of these rows as the camera saw them."""
        return Batch(
            images=torch.from_numpy(self._arrays["images"][rows]),
            free=torch.from_numpy(self._arrays["free"][rows].astype(np.float32)),
            bins=torch.from_numpy(self._arrays["bins"][rows].astype(np.int64)),
            collided=torch.from_numpy(self._arrays["collided"][rows].astype(np.float32)),
        )


def read_views(path: Path) -> Views:
    """Read a file of views; raises ValueError if it holds something else."""
    with np.load(path, allow_pickle=False) as arrays:
        return Views(dict(arrays))


def mirror(batch: Batch) -> Batch:
    """Return what the same robot would see in the mirrored spaces."""
    columns = batch.free.shape[-1]
    bins = torch.stack([batch.bins[..., 0], columns - 1 - batch.bins[..., 1]], dim=-1)
    return Batch(batch.images.flip(2), batch.free.flip(2), bins, batch.collided)


def relight(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return images, (B, px, px, 3) uint8, each under its own brightness, contrast and tint."""
    shape = (len(images), 1, 1, 3)
    gain = rng.uniform(0.75, 1.3, (len(images), 1, 1, 1)) * rng.uniform(0.9, 1.1, shape)
    shift = rng.uniform(-20, 20, (len(images), 1, 1, 1))
    changed = (images.float() - 127.5) * torch.from_numpy(gain).float() + 127.5 + torch.from_numpy(shift).float()
    return changed.round().clamp(0, 255).to(torch.uint8)


def at(grid: Tensor, bins: Tensor) -> Tensor:
    """Return a grid's values, (B, rows, columns), at some bins, (B, K, 2), as (B, K)."""
    return grid.flatten(1).gather(1, bins[..., 0] * grid.shape[-1] + bins[..., 1])
