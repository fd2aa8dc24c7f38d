"""All networks of one MoDE policy, under the names that its bundle stores their weights by."""

from collections.abc import Sequence

import torch
from torch import nn

from policy_models.mode.config import ModeConfig
from policy_models.mode.goals import GoalImage, Language
from policy_models.mode.network import make_denoiser
from policy_models.mode.vision import Perceive, token_width


class ModeNetworks(nn.Module):
    """Goal encoder, image encoders and denoiser.

    Right after construction the denoiser is on the "meta" device: it has no weights until they are loaded, or
    `materialize` draws some. A released one is 2.7 GB, and most who make one have weights for it.
    """

    def __init__(self, config: ModeConfig, cameras: Sequence[str]) -> None:
        """Build the networks for cameras of these names; raises ValueError if they do not fit each other."""
        super().__init__()
        if config.transformer.token_width != token_width(config.images):
            raise ValueError(
                f"the transformer takes image tokens {config.transformer.token_width} wide, "
                f"the encoders give {token_width(config.images)}"
            )
        self.config = config
        with torch.device("meta"):
            self.denoiser = make_denoiser(config.transformer)
        self.perceive = Perceive(config.images, cameras, config.transformer.goal_width)
        self.language = Language(config.text) if config.text else None
        self.look_at_goal = GoalImage(config.vision) if config.vision else None

    def materialize(self, *, dropout: float = 0.0, attention_dropout: float = 0.0) -> None:
        """Give the denoiser fresh weights, for training."""
        self.denoiser = make_denoiser(self.config.transformer, dropout=dropout, attention_dropout=attention_dropout)
