"""ScaleDP, the diffusion transformer of DexVLA: eps from noisy actions, a condition and the robot's state.

Parameter names are those of the published code. Source: Zhu et al. 2024, arXiv:2409.14411; blocks are those of DiT
(Peebles and Xie 2023, arXiv:2212.09748, adaLN-Zero).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policy_models.divla.config import ScaleDpConfig
from policy_models.divla.timestep import cosines_first

_COMBINED = 1024  # hidden width of what joins condition and state
_STEP_WIDTH = 256
_EPS = 1e-6


class Attention(nn.Module):
    """Every action attends to every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, n) to (B, H, n)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The feed-forward layers of a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., n)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then feed-forward, each shifted, scaled and gated by what the head knows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map actions (B, H, n) and conditioning (B, n) to (B, H, n)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate_1 * self.attn(_modulated(x, shift_1, scale_1))
        return x + gate_2 * self.mlp(_modulated(x, shift_2, scale_2))


class FinalLayer(nn.Module):
    """From the last block's width to an action's."""

    def __init__(self, width: int, action_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, action_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map actions (B, H, n) and conditioning (B, n) to (B, H, A)."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(_modulated(x, shift, scale))


class StepEmbedder(nn.Module):
    """From training steps, (B,), to (B, n)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = cosines_first(_STEP_WIDTH)
        self.mlp = nn.Sequential(nn.Linear(_STEP_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed training steps."""
        return self.mlp(self.table(timestep))


class ScaleDp(nn.Module):
    """eps(x, t, condition, state)."""

    def __init__(
        self, config: ScaleDpConfig, *, condition_width: int, state_width: int, action_width: int, horizon: int
    ) -> None:
        super().__init__()
        n = config.width
        self.combine = nn.Sequential(
            nn.Linear(condition_width + state_width, _COMBINED),
            nn.ReLU(),
            nn.Linear(_COMBINED, _COMBINED),
            nn.ReLU(),
            nn.Linear(_COMBINED, condition_width),
        )
        self.x_embedder = nn.Linear(action_width, n)
        self.t_embedder = StepEmbedder(n)
        self.cond_obs_emb = nn.Linear(condition_width, n)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, horizon, n))
        self.blocks = nn.ModuleList(Block(n, config.heads) for _ in range(config.layers))
        self.final_layer = FinalLayer(n, action_width)

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Tensor, state: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            noisy: Actions with noise, of variance 1, (B, H, A), normalised.
            timestep: Training steps, (B,) int64, from 0 (little noise) to 99.
            condition: What the language model made of images and instruction, (B, C).
            state: The robot's state, (B, S), normalised.

        Returns:
            eps, (B, H, A).
        """
        known = self.combine(torch.cat((condition, state), dim=-1))
        c = self.t_embedder(timestep) + self.cond_obs_emb(known)
        x = self.x_embedder(noisy) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale) + shift
