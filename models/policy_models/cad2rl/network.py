"""CAD2RL's network: an image to the probability of a collision in each direction."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policy_models.cad2rl.config import Cad2rlConfig

# Of ImageNet's images, which VGG16 was trained on.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CollisionNetwork(nn.Module):
    """Predicts what flying in each direction comes to, all directions at once."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: Cad2rlConfig) -> None:
        super().__init__()
        self.config = config
        self.features = nn.Sequential(*_stages(config))
        dilation = config.wide_dilation
        self.wide = nn.Sequential(
            nn.Conv2d(config.widths[-1], config.wide, 3, padding=dilation, dilation=dilation),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Conv2d(config.wide, config.wide, 1),
            nn.ReLU(),
            nn.Dropout(config.dropout),
        )
        self.score = nn.Conv2d(config.wide, 1, 1)
        self.register_buffer("mean", 255 * torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(_STD)[:, None, None], persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def logits(self, image: Tensor) -> Tensor:
        """Return the logit of a collision in each direction, (B, rows, columns).

        Args:
            image: (B, height, width, 3) uint8.
        """
        x = (image.permute(0, 3, 1, 2).float() - self.mean) / self.std
        x = self.wide(self.features(x))
        grid = (self.config.rows, self.config.columns)
        if x.shape[-2:] != grid:
            x = F.interpolate(x, grid, mode="bilinear", align_corners=False)
        scores: Tensor = self.score(x)
        return scores[:, 0]

    def forward(self, image: Tensor) -> Tensor:
        """Return the probability of a collision in each direction, (B, rows, columns)."""
        return self.logits(image).sigmoid()


class LeftRightStraight(CollisionNetwork):
    """The baseline that chooses between left, straight and right, after Kim and Chen 2015."""

    def choices(self, image: Tensor) -> Tensor:
        """Return the logit of each choice, (B, 3): left, straight, right. It pools a third of the columns for each."""
        safety = -self.logits(image).mean(1)
        return torch.stack([third.mean(-1) for third in safety.tensor_split(3, dim=-1)], dim=-1)

    def forward(self, image: Tensor) -> Tensor:
        """Return how little each direction is chosen, (B, rows, columns): least in the middle of the chosen third."""
        spared = 1 - self.choices(image).softmax(-1)
        grid = (self.config.rows, self.config.columns)
        return F.interpolate(spared[:, None, None], grid, mode="bilinear", align_corners=False)[:, 0]


def make_network(config: Cad2rlConfig) -> CollisionNetwork:
    """Return a network with fresh weights."""
    return LeftRightStraight(config) if config.head == "left-right-straight" else CollisionNetwork(config)


def _stages(config: Cad2rlConfig) -> list[nn.Module]:
    """Return the layers in torchvision's order, so that both number them alike."""
    layers: list[nn.Module] = []
    channels, stride, dilation = 3, 1, 1
    for i, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
        for _ in range(depth):
            layers.append(nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation))
            layers += [nn.BatchNorm2d(width)] if config.batch_norm else []
            layers.append(nn.ReLU())
            channels = width
        if i == len(config.widths) - 1:
            break
        # 3x3 and not VGG's 2x2, as in DeepLab: 321 pixels then become 161, 81 and 41.
        if stride < config.stride:
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
            stride *= 2
        else:
            layers.append(nn.MaxPool2d(3, stride=1, padding=1))
            dilation = 2
    return layers
