"""Weight-only int8: every matrix of a network in 8 bits, one scale per output channel.

Activations stay in floating point. A step that reads its weights from memory, as a single robot's does, then moves a
quarter of the bytes. Symmetric rounding to [-127, 127]; see Dettmers et al. 2022, section 2.1.
"""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Smaller matrices cost nothing worth saving, and heads and embeddings of a few numbers are what accuracy hangs on.
_SMALLEST = 4096

Module = TypeVar("Module", bound=nn.Module)


class _Int8(nn.Module):
    quantized: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        largest = weight.flatten(1).abs().amax(1).reshape(-1, *(1,) * (weight.ndim - 1))
        scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("quantized", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Tensor:  # a property, since some modules ask their layers for its type
        return self.quantized.float() * self.scale


class Int8Linear(_Int8):
    """`nn.Linear` with an int8 weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return F.linear(x, self.weight, self.bias)


class Int8Conv2d(_Int8):
    """`nn.Conv2d` with an int8 weight; no groups, no dilation."""

    def __init__(self, layer: nn.Conv2d) -> None:
        assert layer.groups == 1 and layer.dilation == (1, 1) and not isinstance(layer.padding, str)
        super().__init__(layer.weight, layer.bias)
        self.stride, self.padding = layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C', h', w')."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


@torch.no_grad()
def int8_weights(module: Module) -> Module:
    """Return a copy whose large matrices are int8; everything else is shared with `module`."""
    tensors = (*module.parameters(), *module.buffers())
    copied = deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child.weight.numel() >= _SMALLEST:
                setattr(parent, name, Int8Linear(child.weight, child.bias))
            elif isinstance(child, nn.Conv2d) and child.weight.numel() >= _SMALLEST:
                setattr(parent, name, Int8Conv2d(child))
    return copied
