"""What a DiVLA learns by: the losses of its actions, of its words, and of what its eyes find."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policy_models.diffusion.schedules import squaredcos_sigmas
from policy_models.divla.config import DivlaConfig
from policy_models.divla.dataset import Batch
from policy_models.divla.eyes import Finder
from policy_models.divla.graphs import Read, See
from policy_models.divla.network import DivlaNetworks

NOISES = 4  # noise levels for each observation


class Learner(nn.Module):
    """The networks with their losses."""

    scale: Tensor  # of actions at each training step
    spread: Tensor  # of noise

    def __init__(self, networks: DivlaNetworks, config: DivlaConfig, size_px: int, things: int) -> None:
        """Take the networks and their shape, the size of the one camera's images, and how many things there can be."""
        super().__init__()
        self.networks = networks
        self.see = See(networks.vlm, config.eyes, size_px, size_px)
        self.read = Read(networks.vlm)
        self.finder = Finder(config.language.width, things)
        sigma = torch.from_numpy(squaredcos_sigmas()).float()
        self.register_buffer("scale", (1 + sigma**2).rsqrt(), persistent=False)
        self.register_buffer("spread", sigma * (1 + sigma**2).rsqrt(), persistent=False)

    def find(self, batch: Batch) -> Tensor:
        """Return the loss of finding things, a scalar."""
        loss: Tensor = self.finder.loss(self.see(batch.images), batch.present, batch.places)
        return loss

    def forward(self, batch: Batch, silent: Tensor, generator: torch.Generator) -> Tensor:
        """Return the losses of noise, of words and of finding, (3,).

        Args:
            batch: Demonstrations.
            silent: Whose head is told of no reasoning, (B,) bool.
            generator: Of noise and its levels.
        """
        said, seen = batch.sequences, self.see(batch.images)
        hidden, _, _ = self.read(said.tokens, said.places, seen, said.positions, said.mask)
        learned = (said.answer & batch.own[:, None])[:, 1:]
        words = F.cross_entropy(self.networks.vlm.lm_head(hidden[:, :-1][learned]), said.tokens[:, 1:][learned])
        context = self.networks.fusion(hidden, said.prefix, said.thought & ~silent[:, None])

        context, state, actions = (
            values.repeat_interleave(NOISES, dim=0) for values in (context, batch.state, batch.actions)
        )
        timestep = torch.randint(0, len(self.scale), (len(actions),), generator=generator)
        eps = torch.randn(actions.shape, generator=generator)
        noisy = self.scale[timestep, None, None] * actions + self.spread[timestep, None, None] * eps
        noise = F.mse_loss(self.networks.head(noisy, timestep, context, state), eps)
        return torch.stack((noise, words, self.finder.loss(seen, batch.present, batch.places)))
