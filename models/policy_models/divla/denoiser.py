"""A head as a denoiser: from eps prediction over training steps to D over noise levels.

With alpha_bar of the training step, x_vp = sqrt(alpha_bar) x and sigma = sqrt((1 - alpha_bar) / alpha_bar), a variance
preserving policy is one of x = x_0 + sigma eps, which the shared samplers walk: D(x, sigma) = x - sigma eps.
"""

import torch
from torch import Tensor, nn

from policy_models.diffusion.schedules import squaredcos_sigmas
from policy_models.divla.config import DivlaConfig, ScaleDpConfig
from policy_models.divla.scale_dp import ScaleDp
from policy_models.divla.unet import ConditionalUnet1d


class Denoiser(nn.Module):
    """D(x, sigma) = x - sigma eps(x / sqrt(1 + sigma^2), t, ...), t the training step whose level is nearest in log."""

    log_sigmas: Tensor

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        log_sigmas = torch.from_numpy(squaredcos_sigmas()).log().float()
        self.register_buffer("log_sigmas", log_sigmas, persistent=False)

    def forward(self, noisy: Tensor, sigma: Tensor, context: Tensor, state: Tensor) -> Tensor:
        """Estimate the clean actions, which may lie beyond [-1, 1].

        Args:
            noisy: Actions with noise of level `sigma`, (B, H, A), normalised.
            sigma: Noise level of each sample, (B,), all positive.
            context: What the head is told, from `Fusion`, (B, C).
            state: The robot's state, (B, S), normalised.

        Returns:
            Clean actions, (B, H, A), normalised.
        """
        timestep = (sigma.log()[:, None] - self.log_sigmas).abs().argmin(dim=-1)
        sigma = sigma[:, None, None]
        eps = self.head(noisy * (1 + sigma**2).rsqrt(), timestep, context, state)
        return noisy - sigma * eps


def make_head(config: DivlaConfig) -> ScaleDp | ConditionalUnet1d:
    """Return a head with fresh weights; raises ValueError if its parts do not fit each other."""
    widths = {
        "condition_width": config.language.width,
        "state_width": config.state_width,
        "action_width": config.action_width,
        "horizon": config.horizon,
    }
    if isinstance(config.head, ScaleDpConfig):
        return ScaleDp(config.head, **widths)
    return ConditionalUnet1d(config.head, **widths)
