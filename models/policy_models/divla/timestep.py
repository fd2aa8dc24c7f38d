"""What the heads are told of the training step t: sines and cosines of it, looked up in a table.

Upstream computes them in bfloat16 even where everything else is in float32, and the weights have learned from what that
rounding leaves. A table has every step's row as upstream computes it, and no graph needs bfloat16 for it.
"""

import math

import torch
from torch import Tensor, nn

from policy_models.diffusion.schedules import SQUAREDCOS_STEPS

_LONGEST = 10_000  # wave length, in steps over 2 pi


class StepTable(nn.Module):
    """From training steps, (B,) int64 below 100, to their rows, (B, width)."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows.float(), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """Look the steps up."""
        return self.rows[timestep]


def cosines_first(width: int) -> StepTable:
    """ScaleDP's table, as in DiT: [cos, sin], the lowest frequency one step above 1/10000 rad."""
    # The device is named so that the table is there even in a network that is built without weights, on "meta".
    numbers = torch.arange(width // 2, dtype=torch.bfloat16, device="cpu")
    frequencies = torch.exp(-math.log(_LONGEST) * numbers / (width // 2))
    angles = _steps()[:, None].float() * frequencies
    return StepTable(torch.cat((angles.cos(), angles.sin()), dim=-1).bfloat16())


def sines_first(width: int) -> StepTable:
    """The UNet's table, as in Diffusion Policy: [sin, cos], the lowest frequency 1/10000 rad; angles are rounded."""
    numbers = torch.arange(width // 2, dtype=torch.bfloat16, device="cpu")
    frequencies = torch.exp(numbers * -(math.log(_LONGEST) / (width // 2 - 1)))
    angles = _steps()[:, None] * frequencies
    return StepTable(torch.cat((angles.sin(), angles.cos()), dim=-1))


def _steps() -> Tensor:
    return torch.arange(SQUAREDCOS_STEPS, device="cpu")
