"""The denoising transformer of MoDE: experts that are chosen by the noise level.

Parameter names are those of the public checkpoints. Source: Reuss et al. 2024, arXiv:2412.12953, section 3; the order
of norms and residuals was read from the published code, where it differs from the paper's eq. 4.
"""

from collections.abc import Callable, Hashable, Iterator
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policy_models.diffusion.preconditioning import Denoiser
from policy_models.mode.config import TransformerConfig
from policy_models.program import Tensors


class RMSNorm(nn.Module):
    """x / rms(x) * g. Unlike `nn.RMSNorm`, eps is a floor under the root, not a term in it."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=self.eps) * self.g


class Attention(nn.Module):
    """Causal multi-head self-attention with normalised queries and keys."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, d) to (B, L, d)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.c_proj(y.transpose(1, 2).flatten(-2))


class _Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 8 * width)

    def forward(self, z: Tensor) -> Tensor:
        projected, gate = self.project(z).chunk(2, dim=-1)
        return projected * F.silu(gate)


class Expert(nn.Module):
    """A SwishGLU feed-forward network, hidden width 4 d."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(_Gate(width), nn.Dropout(dropout), nn.Linear(4 * width, width, bias=False))

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, L, d) to (B, L, d)."""
        return self.mlp(z)


class Experts(nn.ModuleDict):
    """The experts of one block, called `expert_0`, ..."""

    def __init__(self, count: int, width: int, dropout: float) -> None:
        super().__init__({f"expert_{j}": Expert(width, dropout) for j in range(count)})

    def forward(self, z: Tensor, route: Tensor) -> Tensor:
        """Mix the chosen experts' answers; the others are not computed.

        Args:
            z: Tokens, (B, L, d).
            route: Weight of every expert, (B, E), 0 for those that are not chosen; what comes after them is padding,
                since blocks may keep different numbers.
        """
        out = torch.zeros_like(z)
        for expert, weight in zip(self.values(), route.unbind(1)[: len(self)], strict=True):
            rows = weight.nonzero()[:, 0]
            if len(rows) == len(z):  # the usual case: one noise level, one choice
                out = out + weight[:, None, None] * expert(z)
            elif len(rows):
                out = out.index_add(0, rows, weight[rows, None, None] * expert(z[rows]))
        return out


class BranchingExperts(nn.Module):
    """The same function as `Experts`, for export: each expert is a branch that runs if any row of the batch chose it.

    Rows are not sorted by expert, since shapes that depend on data would keep compilers from planning; where the rows
    of a batch share a noise level, as they do when a robot is alone or robots step together, nothing is computed in
    vain.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts.values())

    def forward(self, z: Tensor, route: Tensor) -> Tensor:
        """Map (B, L, d) and (B, E) to (B, L, d)."""
        out = torch.zeros_like(z)
        for expert, weight in zip(self.experts, route.unbind(1)[: len(self.experts)], strict=True):
            if torch.compiler.is_exporting():
                out = out + torch.cond(
                    (weight != 0).any(),
                    lambda z, weight, expert=expert: weight[:, None, None] * expert(z),
                    lambda z, weight: torch.zeros_like(z),
                    (z, weight),
                )
            elif weight.any():  # torch.cond would compile both branches, and compiled layers cannot be watched
                out = out + weight[:, None, None] * expert(z)
        return out


class ChosenExperts(nn.Module):
    """The same function as `Experts` where the caller says who was chosen: the device is not asked, nor waited for.

    As in `BranchingExperts`, an expert that one row chose is computed for all of them.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts.values())
        self.chosen: tuple[int, ...] = ()

    def forward(self, z: Tensor, route: Tensor) -> Tensor:
        """Map (B, L, d) and (B, E) to (B, L, d)."""
        out = torch.zeros_like(z)
        for j in self.chosen:
            out = out + route[:, j, None, None] * self.experts[j](z)
        return out


class _RouterNetwork(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.0), nn.Linear(2 * width, experts))


class Router(nn.Module):
    """From what a block is conditioned on to the probability of each expert."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = _RouterNetwork(width, experts)

    def forward(self, c: Tensor) -> Tensor:
        """Map (B, d) to probabilities, (B, E)."""
        return self.router.mlp(c).softmax(-1).clamp(1e-9, 1 - 1e-9)


class Block(nn.Module):
    """One transformer block with its experts and their router."""

    def __init__(self, config: TransformerConfig, kept: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        d = config.width
        self.ln_1 = RMSNorm(d)
        self.ln_2 = RMSNorm(d)
        self.attn = Attention(d, config.heads, attention_dropout)
        self.router = Router(d, config.experts)
        self.experts: Experts | BranchingExperts | ChosenExperts = Experts(kept, d, dropout)
        self.shared_mlp = Expert(d, dropout) if config.shared_expert else None

    def forward(self, x: Tensor, c: Tensor, route: Tensor) -> Tensor:
        """Map tokens (B, L, d), conditioning (B, 1, d) and route (B, E) to (B, L, d)."""
        # The second residual starts from the normalised z, not from h: the published code does, its weights need it.
        z = self.ln_2(x + self.attn(self.ln_1(x) + c))
        y = z + self.experts(z, route)
        return y if self.shared_mlp is None else y + self.shared_mlp(z)


class ModeDiT(nn.Module):
    """F(x, sigma, tokens, goal) of the EDM denoiser."""

    def __init__(self, config: TransformerConfig, *, dropout: float = 0.0, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, 1 + config.horizon, d))
        self.sigma_emb = nn.Linear(1, d)
        self.sigma_linear = nn.Linear(d, d, bias=False)
        self.tok_emb = nn.Linear(config.token_width, d, bias=False)
        self.goal_emb = nn.Linear(config.goal_width, d, bias=False)
        self.action_emb = nn.Linear(config.action_width, d, bias=False)
        self.blocks = nn.ModuleList(Block(config, kept, dropout, attention_dropout) for kept in config.kept)
        self.ln = RMSNorm(d)
        self.out = nn.Linear(d, config.action_width)

    def probabilities(self, sigma: Tensor, goal: Tensor) -> Tensor:
        """Return every router's probabilities, (B, blocks, E), for noise levels (B,) and goals (B, G)."""
        c = self._condition(self._embed(sigma), goal)[:, 0]
        routers: list[nn.Module] = [block.get_submodule("router") for block in self.blocks]
        return torch.stack([router(c) for router in routers], dim=1)

    def route(self, sigma: Tensor, goal: Tensor) -> Tensor:
        """Return the weight of every expert that was kept, (B, blocks, kept).

        The routers' `top_k` most probable experts are taken, rescaled to a sum of 1. Where experts were merged, one
        that answers for several has the sum of their weights.
        """
        probabilities = self.probabilities(sigma, goal)
        route = chosen(probabilities, probabilities.topk(self.config.top_k).indices)
        if not self.config.merged:
            return route
        answers = torch.eye(max(self.config.kept))[torch.tensor(self.config.merged)]  # (blocks, E, kept)
        return torch.einsum("nbe,bek->nbk", route, answers)

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor, goal: Tensor, route: Tensor) -> Tensor:
        """Predict the raw network output, before preconditioning.

        Args:
            noisy: Scaled noisy actions, (B, H, A).
            sigma: Noise levels, (B,), all positive.
            tokens: Encoded images, (B, C, token width).
            goal: Embedded goals, (B, goal width); all zeros means goal-free.
            route: Weight of every expert, (B, blocks, kept), from `route`.

        Returns:
            (B, H, A).
        """
        noise_level = self._embed(sigma)
        c = self._condition(noise_level, goal)
        goals = self.goal_emb(goal)[:, None] + self.pos_emb[:, :1]
        # All images share a position, with the first action too.
        images = self.tok_emb(tokens) + self.pos_emb[:, 1:2]
        actions = self.action_emb(noisy) + self.pos_emb[:, 1:]
        x = torch.cat((goals, images, actions), dim=1)
        if self.config.noise_token:
            x = torch.cat((noise_level, x), dim=1)
        for i, block in enumerate(self.blocks):
            x = block(x, c, route[:, i])
        return self.out(self.ln(x[:, -self.config.horizon :]))

    def _embed(self, sigma: Tensor) -> Tensor:
        return self.sigma_linear(self.sigma_emb(sigma.log()[:, None, None] / 4))

    def _condition(self, noise_level: Tensor, goal: Tensor) -> Tensor:
        return noise_level + self.goal_emb(goal)[:, None] if self.config.goal_routing else noise_level


def chosen(probabilities: Tensor, indices: Tensor) -> Tensor:
    """Keep the probabilities at `indices`, (B, blocks, k), rescaled to a sum of 1, and 0 elsewhere."""
    kept = torch.zeros_like(probabilities).scatter(-1, indices, probabilities.gather(-1, indices))
    return kept / kept.sum(-1, keepdim=True)


def make_denoiser(config: TransformerConfig, *, dropout: float = 0.0, attention_dropout: float = 0.0) -> Denoiser:
    """Return D(noisy, sigma, tokens, goal, route) with fresh weights."""
    return Denoiser(ModeDiT(config, dropout=dropout, attention_dropout=attention_dropout), config.sigma_data)


def branching(denoiser: Denoiser) -> Denoiser:
    """Return a copy for export that shares every weight with `denoiser`, its experts as branches."""
    return _with_experts(denoiser, BranchingExperts)


def dense(denoiser: Denoiser) -> Denoiser:
    """Return a copy that shares every weight with `denoiser` and has no branches: all rows go through all experts."""
    copied = _with_experts(denoiser, ChosenExperts)
    for block in _blocks(copied):
        assert isinstance(block.experts, ChosenExperts)
        block.experts.chosen = tuple(range(len(block.experts.experts)))
    return copied


class SteeredDenoiser(nn.Module):
    """A denoiser, sharing every weight with `denoiser`, that is told by its caller which experts to compute."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = _with_experts(denoiser, ChosenExperts)

    def steer(self, inputs: Tensors) -> Hashable:
        """Choose every expert that has a weight in a row of `route`, (B, blocks, kept)."""
        chosen = (inputs["route"] != 0).any(axis=0)
        for block, who in zip(_blocks(self.denoiser), chosen, strict=True):
            assert isinstance(block.experts, ChosenExperts)
            block.experts.chosen = tuple(int(j) for j in np.flatnonzero(who[: len(block.experts.experts)]))
        return chosen.tobytes()

    def forward(self, *inputs: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        return self.denoiser(*inputs)


def _with_experts(denoiser: Denoiser, make: Callable[[Experts], BranchingExperts | ChosenExperts]) -> Denoiser:
    tensors = (*denoiser.parameters(), *denoiser.buffers())
    copied = deepcopy(denoiser, {id(tensor): tensor for tensor in tensors})
    for block in _blocks(copied):
        assert isinstance(block.experts, Experts)
        block.experts = make(block.experts)
    return copied


def _blocks(denoiser: Denoiser) -> Iterator[Block]:
    network = denoiser.inner_model
    assert isinstance(network, ModeDiT)
    for block in network.blocks:
        assert isinstance(block, Block)
        yield block
