"""The observation that travels in the network benchmarks: two cameras and the joints of two arms."""

import numpy as np

from policy_client.codec import pack

JOINTS, HORIZON = 14, 16
CAMERAS, IMAGE_PX = ("top", "wrist"), 224


def pack_observations(count: int, *, seed: int = 0) -> list[bytes]:
    """Return messages with different random images and states, so that nothing along the way is an easy case."""
    draw = np.random.default_rng(seed)
    return [
        pack(
            {name: draw.integers(0, 256, (IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8) for name in CAMERAS}
            | {"state": draw.standard_normal(JOINTS, dtype=np.float32)}
        )
        for _ in range(count)
    ]
