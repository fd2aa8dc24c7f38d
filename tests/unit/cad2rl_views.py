"""Views whose pictures tell what is free, made by drawing and not by a simulator."""

import json

import numpy as np


def draw_views(count: int, *, px: int = 16, rows: int = 3, columns: int = 5, tries: int = 4) -> dict[str, np.ndarray]:
    """Return arrays as `policy_sim.flights_views` writes them: columns that are dark in the picture are blocked."""
    rng = np.random.default_rng(0)
    free = np.repeat(rng.integers(0, 2, (count, 1, columns)), rows, axis=1)
    places = np.arange(px) * columns // px
    light = 40 + 160 * free[:, 0, places][:, None, :, None]
    images = (light + rng.integers(0, 40, (count, px, px, 3))).astype(np.uint8)
    bins = np.stack([rng.integers(0, rows, (count, tries)), rng.integers(0, columns, (count, tries))], axis=-1)
    collided = 1 - free[np.arange(count)[:, None], bins[..., 0], bins[..., 1]]
    spec = {"camera": "front", "px": px, "rows": rows, "columns": columns, "fov_deg": [90, 60], "reach_m": 6.0}
    return {
        "images": images,
        "free": free.astype(np.uint8),
        "bins": bins.astype(np.int16),
        "collided": collided.astype(np.float32),
        "spec": np.array(json.dumps({**spec, "randomise": "all", "seed": 0})),
    }
