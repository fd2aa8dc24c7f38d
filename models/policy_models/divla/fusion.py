"""From hidden states of the language model to what the head is told.

Parameter names are those of the published code. Source: Wen et al. 2024 (DiVLA), arXiv:2412.03293, section 3
("reasoning injection", by FiLM, Perez et al. 2018); what is added and pooled was read from the published code.
"""

import torch
from torch import Tensor, nn


class ActionProjector(nn.Module):
    """Linear, GELU, Linear over pooled hidden states, (B, C) to (B, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList((nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)))

    def forward(self, pooled: Tensor) -> Tensor:
        """Project."""
        for layer in self.mlps:
            pooled = layer(pooled)
        return pooled


class ReasoningFilm(nn.Module):
    """The reasoning scales and shifts; freshly made it changes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_fc = nn.Linear(width, width)
        self.shift_fc = nn.Linear(width, width)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, p: Tensor, r: Tensor) -> Tensor:
        """Modulate p by r, both (B, C)."""
        return p * (1 + self.scale_fc(r)) + self.shift_fc(r)


class Fusion(nn.Module):
    """cond = p (1 + scale(r)) + shift(r) + mean, in the parts that a server computes at different times.

    p and mean come from the prompt, images and instruction, and are there before the first word of reasoning; r comes
    from the reasoning. Where there is none, FiLM is left out: cond = p + mean. Upstream has no answer for that case.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_action_proj = ActionProjector(width)
        self.reasoning_action_proj = ActionProjector(width)
        self.reasoning_film = ReasoningFilm(width)

    def prefix_part(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return p and mean, each (B, C).

        Args:
            hidden: Last hidden states, after the final norm, (B, L, C).
            mask: Which of them are the prompt's, paddings excluded, (B, L); at least one a row.
        """
        mean = _masked_mean(hidden, mask)
        return self.input_action_proj(mean), mean

    def reasoning_part(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return r, (B, C), of hidden states (B, L, C) and which of them are the reasoning's, (B, L)."""
        return self.reasoning_action_proj(_masked_mean(hidden, mask))

    def inject(self, p: Tensor, mean: Tensor, r: Tensor | None) -> Tensor:
        """Return what the head is told, (B, C), of p, mean and r, each (B, C); r is None where nothing was reasoned."""
        return (p if r is None else self.reasoning_film(p, r)) + mean

    def forward(self, hidden: Tensor, prefix: Tensor, reasoning: Tensor) -> Tensor:
        """Return what the head is told, (B, C), in one go; rows without reasoning are left without FiLM.

        Args:
            hidden: Last hidden states, after the final norm, (B, L, C).
            prefix: Which of them are the prompt's, (B, L) bool; at least one a row.
            reasoning: Which of them are the reasoning's, (B, L) bool.
        """
        p, mean = self.prefix_part(hidden, prefix)
        injected = self.inject(p, mean, self.reasoning_part(hidden, reasoning))
        return torch.where(reasoning.any(dim=1, keepdim=True), injected, self.inject(p, mean, None))


def _masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average (B, L, C) over where the mask, (B, L), is set; zeros where it is nowhere."""
    mask = mask.bool()[:, :, None]
    # In float32 and rounded once, as torch's own mean does it. What is masked may be anything, even not a number.
    total = torch.where(mask, hidden.float(), 0.0).sum(dim=1)
    return (total / mask.sum(dim=1).clamp(min=1)).to(hidden.dtype)
