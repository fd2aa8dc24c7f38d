"""What trains the eyes before anything is said: things are to be found among image tokens.

A language model that is trained from nothing would have to learn from words and actions alone where things are. So its
image tower is trained first, as those of large models are: it is told what lies where. What finds things is thrown away
afterwards; the tokens that it learned to read remain.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SPREAD_M = 0.15  # of places, so that they count as much as presences


class Finder(nn.Module):
    """One question for each kind of thing, answered by attention over the image tokens."""

    def __init__(self, width: int, things: int) -> None:
        """Take the width of tokens, C, and how many things there can be, K."""
        super().__init__()
        self.question = nn.Parameter(torch.randn(things, width) / 10)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.answer = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return how likely each thing is there, (B, K) logits, and where, (B, K, 2) m; tokens are (B, N, C)."""
        scale = 4 / self.question.shape[1] ** 0.5
        attention = (scale * self.question @ self.key(tokens).transpose(1, 2)).softmax(dim=-1)
        answer = self.answer(F.gelu(attention @ self.value(tokens)) + self.question)
        return answer[..., 0], _SPREAD_M * answer[..., 1:]

    def loss(self, tokens: Tensor, present: Tensor, places: Tensor) -> Tensor:
        """Return how wrong the answers are, a scalar.

        Args:
            tokens: (B, N, C).
            present: Whether a thing is there, (B, K) bool.
            places: Where, (B, K, 2) m; not looked at for things that are not.
        """
        likely, where = self(tokens)
        far = ((where - places) / _SPREAD_M).square().sum(dim=-1)
        return 5 * F.binary_cross_entropy_with_logits(likely, present.float()) + 0.5 * far[present].mean()
