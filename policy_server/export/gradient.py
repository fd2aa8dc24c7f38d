"""Writes a graph's gradient down as a graph of its own, so that compiled engines can pull through it."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from policy_models.program import COTANGENT, DIFFERENTIATED, GRADIENT, Graph

# Operations that torch's exporter to ONNX does not know, though torch knows what they are made of.
_UNKNOWN: Sequence[Any] = [torch.ops.aten.silu_backward.default, torch.ops.aten.mish_backward.default]
_BATCH = 61


def gradient_of(graph: Graph) -> Graph:
    """Return the graph that gives the same outputs and `GRADIENT` besides, from the same inputs and `COTANGENT`.

    The backward pass is traced into plain operations, batch size and all, since no exporter knows one.
    """
    module = graph.differentiated.eval()
    module.requires_grad_(False)
    names = list(graph.inputs)
    at = names.index(DIFFERENTIATED)

    def run(cotangent: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        point = inputs[at].detach().requires_grad_()
        with torch.enable_grad():
            outputs = module(*inputs[:at], point, *inputs[at + 1 :])
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        (gradient,) = torch.autograd.grad(outputs[0], point, cotangent)
        return (*(output.detach() for output in outputs), gradient)

    with torch.no_grad():
        outputs = module(*graph.inputs.values())
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    inputs = {COTANGENT: torch.randn(first.shape, generator=torch.Generator().manual_seed(0)), **graph.inputs}
    return Graph(_Traced(run, list(inputs.values())), inputs, (*graph.outputs, GRADIENT))


def _decompositions() -> dict[Any, Callable[..., Any]]:
    known = cast(dict[Any, Callable[..., Any]], get_decompositions(_UNKNOWN))
    return {**known, torch.ops.aten.convolution_backward.default: _convolution_backward}


def _convolution_backward(
    cotangent: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor, None, None]:
    """Return the gradient by x: the transposed convolution of the cotangent, or the plain one of a transposed one."""
    assert output_mask == [True, False, False], "weights are constants here"
    missing = [0] * len(stride)
    if not transposed:
        for i, (s, p, d) in enumerate(zip(stride, padding, dilation, strict=True)):
            reached = (cotangent.shape[2 + i] - 1) * s - 2 * p + d * (weight.shape[2 + i] - 1) + 1
            missing[i] = x.shape[2 + i] - reached
    gradient = torch.ops.aten.convolution.default(
        cotangent, weight, None, stride, padding, dilation, not transposed, missing, groups
    )
    return gradient, None, None


class _Traced(torch.nn.Module):
    """A function as the operations that it runs."""

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], examples: list[Tensor]) -> None:
        super().__init__()
        # Sizes that are equal here are taken for the same one, so the batch must be like no other size.
        batch = [tensor[:1].expand(_BATCH, *tensor.shape[1:]).clone() for tensor in examples]
        # Fused attention has a backward pass that only torch knows; plain attention is made of plain operations.
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            trace = make_fx(run, cast(Any, _decompositions()), tracing_mode="symbolic", _allow_non_fake_inputs=True)
            self.operations = trace(*batch)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.operations(*inputs)
        return outputs
