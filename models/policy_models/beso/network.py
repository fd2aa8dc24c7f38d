"""The score network of BESO: a GPT over noise level, goal, states and noisy actions.

Parameter names are those of the public checkpoints. Source: Reuss et al. 2023, section III and appendix; the order of
tokens and the shared position of a state and its action were read from the published code.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policy_models.beso.config import BesoConfig
from policy_models.diffusion.preconditioning import Denoiser


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, d) to (B, L, d)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(-2))


class FusedAttention(nn.Module):
    """The same function as `Attention`, for export: one projection instead of three, and the mask a constant.

    Compiled graphs of small networks spend their time between operations, and this has a quarter fewer. Eager torch is
    better off with `Attention`.
    """

    mask: Tensor

    def __init__(self, attention: Attention, length: int) -> None:
        super().__init__()
        self.heads = attention.heads
        parts = (attention.query, attention.key, attention.value)
        self.qkv = nn.Linear(attention.proj.in_features, 3 * attention.proj.in_features)
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            self.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        self.proj = attention.proj
        self.register_buffer("mask", torch.full((length, length), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, d) to (B, L, d), for the one length L that it was made for."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + self.mask).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn: Attention | FusedAttention = Attention(width, heads, attention_dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, d) to (B, L, d)."""
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class ScoreGPT(nn.Module):
    """F(x, sigma, states, goal) of the EDM denoiser."""

    def __init__(self, config: BesoConfig, *, dropout: float = 0.0, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.tok_emb = nn.Linear(config.state_width, d)
        # One row more than is used: the published checkpoints have it.
        self.pos_emb = nn.Parameter(torch.zeros(1, config.goal_length + config.action_tokens + 1, d))
        self.sigma_emb = nn.Linear(1, d)
        self.action_emb = nn.Linear(config.action_width, d)
        self.blocks = nn.Sequential(*(Block(d, config.heads, dropout, attention_dropout) for _ in range(config.layers)))
        self.ln_f = nn.LayerNorm(d)
        self.action_pred = (
            nn.Sequential(
                nn.Linear(d, config.hidden_output), nn.SiLU(), nn.Linear(config.hidden_output, config.action_width)
            )
            if config.hidden_output
            else nn.Linear(d, config.action_width)
        )
        self.apply(_initialise)
        nn.init.normal_(self.pos_emb, std=0.02)

    def forward(self, noisy: Tensor, sigma: Tensor, states: Tensor, goal: Tensor) -> Tensor:
        """Predict the raw network output, before preconditioning.

        Args:
            noisy: Scaled noisy actions, (B, t - 1 + H, A).
            sigma: Noise levels, (B,), all positive.
            states: Normalised observations, (B, t, S), with t up to the window T.
            goal: Normalised goals, (B, G, S); all zeros means goal-free.

        Returns:
            (B, t - 1 + H, A).
        """
        t, G = states.shape[1], self.config.goal_length
        positions = self.pos_emb[:, G : G + noisy.shape[1]]
        noise_level = self.sigma_emb(sigma.log()[:, None, None] / 4)
        actions = self.action_emb(noisy) + positions
        # A state and the action taken in it share a position.
        pairs = torch.stack((self.tok_emb(states) + positions[:, :t], actions[:, :t]), dim=2).flatten(1, 2)
        goals = self.tok_emb(goal) + self.pos_emb[:, :G]
        x = self.blocks(torch.cat((noise_level, goals, pairs, actions[:, t:]), dim=1))
        x = x[:, 1 + G :]
        of_actions = torch.cat((x[:, 1 : 2 * t : 2], x[:, 2 * t :]), dim=1)
        return self.action_pred(self.ln_f(of_actions))


def make_denoiser(config: BesoConfig, *, dropout: float = 0.0, attention_dropout: float = 0.0) -> Denoiser:
    """Return D(noisy, sigma, states, goal) with fresh weights."""
    return Denoiser(ScoreGPT(config, dropout=dropout, attention_dropout=attention_dropout), config.sigma_data)


def fused(denoiser: Denoiser) -> Denoiser:
    """Return a copy with every attention in its fused form, for export; it takes full windows only."""
    copied = deepcopy(denoiser)
    network = copied.inner_model
    assert isinstance(network, ScoreGPT)
    length = 1 + network.config.goal_length + network.config.window + network.config.action_tokens
    for block in network.blocks:
        assert isinstance(block, Block) and isinstance(block.attn, Attention)
        block.attn = FusedAttention(block.attn, length)
    return copied


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
