"""Gradients as plain operations: the backward pass of convolutions, which exporters do not know."""

import pytest
import torch
from torch import nn

from policy_models.divla.config import UnetConfig
from policy_models.divla.denoiser import Denoiser
from policy_models.divla.unet import ConditionalUnet1d
from policy_models.program import COTANGENT, GRADIENT, Graph
from policy_server.export.gradient import gradient_of


class Convolved(nn.Module):
    """Takes `noisy` through one convolution."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return self.convolution(noisy).sin()


def compare(graph: Graph) -> None:
    traced = gradient_of(graph)
    assert traced.outputs[-1] == GRADIENT
    drawn = {name: torch.randn(3, *tensor.shape[1:]).abs() + 0.1 for name, tensor in traced.inputs.items()}
    got = traced.module(*drawn.values())
    inputs = {name: tensor.clone() for name, tensor in drawn.items() if name != COTANGENT}
    inputs["noisy"].requires_grad_()
    output = graph.differentiated(*inputs.values())
    (wanted,) = torch.autograd.grad(output, inputs["noisy"], drawn[COTANGENT])
    torch.testing.assert_close(got[0], output.detach())
    torch.testing.assert_close(got[-1], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv1d(3, 5, 5, padding=2),
        nn.Conv1d(3, 5, 3, stride=2, padding=1),  # an even length leaves a row over
        nn.Conv1d(4, 4, 3, dilation=2, groups=2),
        nn.ConvTranspose1d(3, 5, 4, stride=2, padding=1),
        nn.ConvTranspose1d(3, 5, 3, stride=2, output_padding=1),
    ],
    ids=["plain", "stride", "dilation and groups", "transposed", "transposed with more at its end"],
)
def test_a_convolution_is_differentiated_as_torch_does(convolution: nn.Module) -> None:
    torch.manual_seed(0)
    module = Convolved(convolution).eval()
    channels = convolution.in_channels
    compare(Graph(module, {"noisy": torch.randn(2, channels, 12)}, ("denoised",), differentiated=module))


def test_a_unet_is_differentiated_as_torch_does() -> None:
    torch.manual_seed(0)
    head = ConditionalUnet1d(
        UnetConfig(widths=(16, 24, 32), step_width=16), condition_width=12, state_width=3, action_width=2, horizon=8
    )
    module = Denoiser(head).eval()
    inputs = {
        "noisy": torch.randn(2, 8, 2),
        "sigma": torch.ones(2),
        "context": torch.randn(2, 12),
        "state": torch.ones(2, 3),
    }
    compare(Graph(module, inputs, ("denoised",), differentiated=module))
