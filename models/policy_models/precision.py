"""Low precision as part of the network, for compilers that keep every type of a graph as it is written.

TensorRT's strongly typed networks are such: what a matrix product computes in is decided here, before the export.
Only the products of linear layers and convolutions change. Norms, softmax, attention's own products (under a
hundredth of the work at these lengths), residual sums and small layers, among them the embedding of the noise level,
stay in float32.

- "f16", "bf16": operands in 16 bits, the bias added in float32. Convolutions are float16 in every low precision: ONNX
  has them in bfloat16 from opset 22 on.
- "int8", "fp8": linear layers on 8-bit operands, scaled per tensor for activations and, for int8, per output channel
  for weights (Wu et al. 2020, arXiv:2004.09602, section 3); E4M3 for fp8 (Micikevicius et al. 2022, arXiv:2209.05433).
  A layer that calibration never reached, such as an expert that no noise level of the schedule chose, is float16.

In eager torch these modules compute what the exported graph means, rounding included.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policy_models.spec import Precision

CALIBRATED: frozenset[Precision] = frozenset({"fp8", "int8"})

# Smaller matrices cost nothing worth saving, and heads and embeddings of a few numbers are what accuracy hangs on.
_SMALLEST = 4096
# Values of one layer's input that are kept from one call to look for its best scale.
_SAMPLE = 2048
_CANDIDATES = 40

Module = TypeVar("Module", bound=nn.Module)


@torch.library.custom_op("policy_models::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return x / scale as the nearest value of the type of `zero`; ONNX's QuantizeLinear. `zero` holds zeros."""
    return _rounded(x / scale, zero.dtype)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero.dtype)


@torch.library.custom_op("policy_models::dequantize", mutates_args=())
def dequantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return x * scale in float32, a scale of one axis along the last; ONNX's DequantizeLinear. `zero` holds zeros."""
    return x.float() * scale


@dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


class _FloatImages(nn.Module):
    """A graph whose uint8 inputs become float32 before anything else: TensorRT has uint8 for inputs alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*(x.float() if x.dtype == torch.uint8 else x for x in inputs))


class HalfLinear(nn.Module):
    """`nn.Linear` with 16-bit operands."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().T.to(dtype).contiguous())
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        y = (x.to(self.weight.dtype) @ self.weight).float()
        return y if self.bias is None else y + self.bias


class HalfConv2d(nn.Module):
    """`nn.Conv2d` with float16 operands; no dilation."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d) -> None:
        assert layer.dilation == (1, 1) and not isinstance(layer.padding, str)
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().half())
        self.register_buffer("bias", layer.bias)
        self.stride, self.padding, self.groups = layer.stride, layer.padding, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C', h', w')."""
        y = F.conv2d(x.half(), self.weight, None, self.stride, self.padding, groups=self.groups).float()
        return y if self.bias is None else y + self.bias[:, None, None]


class QuantizedLinear(nn.Module):
    """`nn.Linear` on 8-bit operands; its graph has QuantizeLinear and DequantizeLinear around the product."""

    quantized: Tensor  # (in, out)
    weight_scale: Tensor  # (out,) for int8, a scalar for fp8
    input_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, largest: float) -> None:
        """Quantize a layer whose inputs are cut off at +-`largest`."""
        super().__init__()
        weight = layer.weight.detach().T
        self.limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
        extent = weight.abs().amax(0) if dtype == torch.int8 else weight.abs().amax()
        tiny = torch.finfo(torch.float32).tiny
        self.register_buffer("weight_scale", (extent / self.limit).clamp(min=tiny))
        self.register_buffer("input_scale", torch.tensor(largest / self.limit).clamp(min=tiny))
        self.register_buffer("quantized", _rounded(weight / self.weight_scale, dtype).contiguous())
        self.register_buffer("bias", layer.bias)
        # Compilers take the type from the zero points, which must all be zero.
        self.register_buffer("input_zero", torch.zeros((), dtype=dtype))
        self.register_buffer("weight_zero", torch.zeros(self.weight_scale.shape, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        x = dequantize(quantize(x, self.input_scale, self.input_zero), self.input_scale, self.input_zero)
        y = x @ dequantize(self.quantized, self.weight_scale, self.weight_zero)
        return y if self.bias is None else y + self.bias


class InputRanges:
    """What the large linear layers of a module were given, layer by layer."""

    def __init__(self) -> None:
        self._seen: dict[str, list[Tensor]] = {}
        self._largest: dict[str, float] = {}
        self._draw = torch.Generator().manual_seed(0)

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Look at every call of `module` while the context lasts."""
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._see(name, inputs[0]))
            for name, layer in module.named_modules()
            if _is_large_linear(layer)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, name: str, x: Tensor) -> None:
        magnitudes = x.detach().abs().flatten()
        self._largest[name] = max(self._largest.get(name, 0.0), float(magnitudes.max()))
        if len(magnitudes) > _SAMPLE:  # at random: a stride would fall into step with the features
            magnitudes = magnitudes[torch.randint(len(magnitudes), (_SAMPLE,), generator=self._draw)]
        self._seen.setdefault(name, []).append(magnitudes)

    def cut(self, name: str, precision: Precision) -> float | None:
        """Return where the inputs of a layer are cut off; None if it was never given anything but zeros.

        fp8 has room for rare large values beside small ones, so nothing is cut. int8 has 127 equal steps, and the cut
        is the one with the least squared error over what was seen.
        """
        largest = self._largest.get(name, 0.0)
        if largest == 0.0:
            return None
        if precision == "fp8":
            return largest
        seen = torch.cat(self._seen[name])
        cuts = torch.linspace(1 / _CANDIDATES, 1, _CANDIDATES) * largest
        errors = [
            float((_rounded(seen / (c / 127), torch.int8).float() * (c / 127) - seen).square().sum()) for c in cuts
        ]
        return float(cuts[min(range(_CANDIDATES), key=errors.__getitem__)])


@torch.no_grad()
def lowered(module: Module, precision: Precision, ranges: InputRanges | None = None) -> nn.Module:
    """Return a copy for export in `precision`; what does not change is shared with `module`.

    Args:
        module: A graph's module, in the form that compiles best.
        precision: What its products are computed in.
        ranges: What its linear layers are given; "fp8" and "int8" need it.
    """
    tensors = (*module.parameters(), *module.buffers())
    copied = deepcopy(module, {id(tensor): tensor for tensor in tensors})
    if precision != "f32":
        for path, parent in list(copied.named_modules()):
            for name, child in list(parent.named_children()):
                changed = _changed(child, f"{path}.{name}".lstrip("."), precision, ranges)
                if changed is not None:
                    setattr(parent, name, changed)
    return _FloatImages(copied).eval()


def _changed(layer: nn.Module, path: str, precision: Precision, ranges: InputRanges | None) -> nn.Module | None:
    if isinstance(layer, nn.Conv2d) and layer.weight.numel() >= _SMALLEST:
        return HalfConv2d(layer)
    if not isinstance(layer, nn.Linear) or not _is_large_linear(layer):
        return None
    if precision not in CALIBRATED:
        return HalfLinear(layer, torch.bfloat16 if precision == "bf16" else torch.float16)
    assert ranges is not None, f"{precision} needs calibrated ranges"
    cut = ranges.cut(path, precision)
    if cut is None:
        return HalfLinear(layer, torch.float16)
    return QuantizedLinear(layer, torch.int8 if precision == "int8" else torch.float8_e4m3fn, cut)


def _is_large_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and layer.weight.numel() >= _SMALLEST


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest value of `dtype`, cut off at +-127 or +-448."""
    if dtype == torch.int8:
        return x.round().clamp(-127, 127).to(dtype)
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)
