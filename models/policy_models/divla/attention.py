"""Attention of grouped queries to an old cache and to new tokens, without a copy of either.

transformers' own repeats keys and values for every head (Ainslie et al. 2023, arXiv:2305.13245, has several share one)
and writes old and new ones into one tensor; compiled as it stands, both would be moved for every word of an answer.
"""

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

_NAME = "grouped"

Model = TypeVar("Model", bound=PreTrainedModel)


class Memory:
    """Stands for transformers' cache: it holds what stood before and takes what is new, layer by layer."""

    def __init__(self, cache: Tensor | None = None) -> None:
        """Remember a cache, (B, layers, 2, kv heads, K, head width); None where nothing stood before."""
        self._cache = cache
        self._new: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """See `transformers.Cache.update`; both are (B, kv heads, L, head width)."""
        self._new.append(torch.stack((key, value), dim=1))
        return key, value

    def before(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values that stood before, each (B, kv heads, K, head width)."""
        return None if self._cache is None else (self._cache[:, layer, 0], self._cache[:, layer, 1])

    def entries(self) -> Tensor:
        """Return what was new, (B, layers, 2, kv heads, L, head width)."""
        return torch.stack(self._new, dim=1)


def grouped(model: Model) -> Model:
    """Return a copy that shares every weight with `model` and attends by `_attend`; it takes a `memory`."""
    tensors = (*model.parameters(), *model.buffers())
    copied = deepcopy(model, {id(tensor): tensor for tensor in tensors})
    copied.set_attn_implementation(_NAME)
    return copied


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    *,
    scaling: float,
    memory: Memory,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' `eager_attention_forward` does.

    Args:
        module: The layer's own; it knows its number.
        query: (B, heads, L, head width).
        key: Of the new tokens, (B, kv heads, L, head width).
        value: Likewise.
        hidden: Added to the scores, (B, 1, L, K + L); what stood before comes first.
        scaling: Of the scores.
        memory: What stood before.

    Returns:
        (B, L, heads, head width), and no weights.
    """
    groups, length = key.shape[1], key.shape[2]
    query = query.unflatten(1, (groups, -1)).flatten(2, 3) * scaling
    scores = query @ key.transpose(2, 3)
    before = memory.before(module.layer_idx)
    if before is not None:
        scores = torch.cat((query @ before[0].transpose(2, 3), scores), dim=-1)
    weights = (scores.unflatten(2, (-1, length)) + hidden[:, :, None]).softmax(dim=-1).flatten(2, 3)
    if before is None:
        attended = weights @ value
    else:
        old, new = weights.split((weights.shape[-1] - length, length), dim=-1)
        attended = old @ before[1] + new @ value
    return attended.unflatten(2, (-1, length)).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(_NAME, _attend)
