"""The UNet of DiVLA: eps from noisy actions, a condition and the robot's state, by convolutions over time.

Parameter names are those of the published code. Source: Chi et al. 2023, arXiv:2303.04137, section III.A, whose
published network this follows, but for what DiVLA put in front of it (`norm_after_pool`, `combine`).
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from policy_models.divla.config import UnetConfig
from policy_models.divla.timestep import sines_first

_LAST_GROUPS = 8  # of the last norm, whatever the configuration says of the others


class ConvBlock(nn.Module):
    """Convolution over time, group norm, Mish."""

    def __init__(self, width_in: int, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(width_in, width, kernel, padding=kernel // 2), nn.GroupNorm(groups, width), nn.Mish()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width_in, H) to (B, width, H)."""
        return self.block(x)


class ResidualBlock(nn.Module):
    """Two convolutions; what the head knows scales and shifts the channels between them (FiLM)."""

    def __init__(self, width_in: int, width: int, known_width: int, config: UnetConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            (
                ConvBlock(width_in, width, config.kernel, config.groups),
                ConvBlock(width, width, config.kernel, config.groups),
            )
        )
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(known_width, 2 * width))
        self.residual_conv = nn.Conv1d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        """Map (B, width_in, H) and what is known (B, K) to (B, width, H)."""
        scale, shift = self.cond_encoder(known)[:, :, None].chunk(2, dim=1)
        out = scale * self.blocks[0](x) + shift
        return self.blocks[1](out) + self.residual_conv(x)


class Resample(nn.Module):
    """Half or twice as many steps of time."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, H) to (B, width, H/2 or 2H)."""
        return self.conv(x)


class ConditionalUnet1d(nn.Module):
    """eps(x, t, condition, state)."""

    def __init__(
        self, config: UnetConfig, *, condition_width: int, state_width: int, action_width: int, horizon: int
    ) -> None:
        """Build the network; raises ValueError if `horizon` cannot be halved at every level but the last."""
        super().__init__()
        halved = 2 ** (len(config.widths) - 1)
        if horizon % halved:
            raise ValueError(f"a UNet of {len(config.widths)} levels needs a horizon in {halved}s, got {horizon}")
        known_width = config.step_width + condition_width

        def level(width_in: int, width: int, resample: nn.Module) -> nn.ModuleList:
            first = ResidualBlock(width_in, width, known_width, config)
            return nn.ModuleList((first, ResidualBlock(width, width, known_width, config), resample))

        def half(width: int) -> nn.Module:
            return Resample(nn.Conv1d(width, width, 3, stride=2, padding=1))

        def twice(width: int) -> nn.Module:
            return Resample(nn.ConvTranspose1d(width, width, 4, stride=2, padding=1))

        self.norm_after_pool = nn.LayerNorm(condition_width)
        self.combine = nn.Linear(condition_width + state_width, condition_width)
        self.diffusion_step_encoder = nn.Sequential(
            sines_first(config.step_width),
            nn.Linear(config.step_width, 4 * config.step_width),
            nn.Mish(),
            nn.Linear(4 * config.step_width, config.step_width),
        )
        first, last = config.widths[0], config.widths[-1]
        downs = list(pairwise((action_width, *config.widths)))
        self.down_modules = nn.ModuleList(
            level(width_in, width, half(width) if i < len(downs) - 1 else nn.Identity())
            for i, (width_in, width) in enumerate(downs)
        )
        self.mid_modules = nn.ModuleList(ResidualBlock(last, last, known_width, config) for _ in range(2))
        # As many ups as downs that halve: what the first level leaves for them is never taken up.
        self.up_modules = nn.ModuleList(
            level(2 * width, width_in, twice(width_in)) for width_in, width in reversed(downs[1:])
        )
        self.final_conv = nn.Sequential(
            ConvBlock(first, first, config.kernel, _LAST_GROUPS), nn.Conv1d(first, action_width, 1)
        )

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Tensor, state: Tensor) -> Tensor:
        """Predict the noise; see `ScaleDp.forward`."""
        condition = self.combine(torch.cat((self.norm_after_pool(condition), state), dim=-1))
        known = torch.cat((self.diffusion_step_encoder(timestep), condition), dim=-1)
        x = noisy.transpose(1, 2)
        skipped = []
        for level in self.down_modules:
            first, second, resample = level.children()
            x = second(first(x, known), known)
            skipped.append(x)
            x = resample(x)
        for block in self.mid_modules:
            x = block(x, known)
        for level in self.up_modules:
            first, second, resample = level.children()
            x = resample(second(first(torch.cat((x, skipped.pop()), dim=1), known), known))
        return self.final_conv(x).transpose(1, 2)
