"""MoDE's denoiser as upstream runs it: experts are routed anew for every token, in every block and at every step."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from policy_models.diffusion.preconditioning import Denoiser
from policy_models.mode.network import Block, ModeDiT


class TokenRouted(nn.Module):
    """A block that asks its router about every token's copy of the noise level, and gathers tokens by expert.

    Upstream's bookkeeping (counts of experts, checks of probabilities) is left out; it would only slow the yardstick.
    """

    def __init__(self, block: Block, top_k: int) -> None:
        super().__init__()
        self.block = block
        self.top_k = top_k

    def forward(self, x: Tensor, c: Tensor, route: Tensor) -> Tensor:
        """Map tokens (B, L, d) and conditioning (B, 1, d) to (B, L, d); `route` is ignored."""
        block = self.block
        z = block.ln_2(x + block.attn(block.ln_1(x) + c))
        tokens = z.flatten(0, 1)
        probabilities = block.router(c.repeat(1, z.shape[1], 1).flatten(0, 1))
        indices = probabilities.topk(self.top_k).indices
        chosen = torch.zeros_like(probabilities).scatter(1, indices, 1)
        weights = probabilities * chosen
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for j, expert in enumerate(block.experts.children()):
            rows = chosen[:, j].nonzero()[:, 0]
            if len(rows):
                out.index_add_(0, rows, weights[rows, j, None] * expert(tokens[rows]))
        y = z + out.view_as(z)
        mixed: Tensor = y if block.shared_mlp is None else y + block.shared_mlp(z)
        return mixed


def token_routed(denoiser: Denoiser) -> Denoiser:
    """Return a copy that shares every weight with `denoiser` and routes as upstream does."""
    copied = sharing_copy(denoiser)
    network = copied.inner_model
    assert isinstance(network, ModeDiT)
    if network.config.merged:
        raise ValueError("experts were merged, which upstream does not know")
    blocks = []
    for block in network.blocks:
        assert isinstance(block, Block)
        blocks.append(TokenRouted(block, network.config.top_k))
    network.blocks = nn.ModuleList(blocks)
    return copied


def sharing_copy(denoiser: Denoiser) -> Denoiser:
    """Return a copy whose modules can be replaced, while its weights are those of `denoiser`."""
    tensors = (*denoiser.parameters(), *denoiser.buffers())
    return deepcopy(denoiser, {id(tensor): tensor for tensor in tensors})
