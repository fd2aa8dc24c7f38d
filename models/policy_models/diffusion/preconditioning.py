"""EDM preconditioning: what makes a raw network a denoiser (Karras et al. 2022, Table 1, EDM column)."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (c_skip, c_out, c_in), each shaped like `sigma`."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()


class Denoiser(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, sigma, ...).

    The inner network F gets the raw sigma and embeds it as c_noise = ln(sigma) / 4 itself.
    """

    def __init__(self, inner_model: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.sigma_data = sigma_data

    def forward(self, noisy: Tensor, sigma: Tensor, *context: Tensor) -> Tensor:
        """Estimate the clean actions.

        Args:
            noisy: Actions with noise of level `sigma`, (B, H, A), normalised.
            sigma: Noise level of each sample, (B,), all positive.
            context: Whatever else the inner network takes.

        Returns:
            Clean actions, (B, H, A), normalised.
        """
        c_skip, c_out, c_in = (c[:, None, None] for c in scalings(sigma, self.sigma_data))
        return c_out * self.inner_model(c_in * noisy, sigma, *context) + c_skip * noisy

    def loss(self, clean: Tensor, sigma: Tensor, *context: Tensor, noise: Tensor) -> Tensor:
        """The EDM training loss (eq. 8, with lambda = 1/c_out^2), a scalar.

        Args:
            clean: Demonstrated actions, (B, H, A), normalised.
            sigma: Noise level of each sample, (B,).
            context: Whatever else the inner network takes.
            noise: Standard normal noise, (B, H, A).
        """
        c_skip, c_out, c_in = (c[:, None, None] for c in scalings(sigma, self.sigma_data))
        noisy = clean + noise * sigma[:, None, None]
        target = (clean - c_skip * noisy) / c_out
        return (self.inner_model(c_in * noisy, sigma, *context) - target).square().mean()


def loglogistic(count: int, *, sigma_min: float, sigma_max: float, generator: torch.Generator) -> Tensor:
    """Draw training noise levels as BESO and MoDE do: log-logistic, loc ln 0.5, scale 0.5, truncated; (count,)."""
    loc, scale = math.log(0.5), 0.5
    low, high = (1 / (1 + math.exp(-(math.log(sigma) - loc) / scale)) for sigma in (sigma_min, sigma_max))
    u = torch.rand(count, generator=generator) * (high - low) + low
    return torch.exp(loc + scale * torch.logit(u))


class ExponentialAverage:
    """Shadow weights, averaged with the warm-up of k-diffusion: min(decay, (1 + n) / (10 + n))."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow: dict[str, Any] = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the shadow weights towards the current ones; call once after every optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.shadow[name].lerp_(value, 1 - decay)
            else:
                self.shadow[name].copy_(value)  # a counter, such as a batch norm's number of batches
