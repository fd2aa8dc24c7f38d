"""Image encoders of MoDE: ResNets whose features are modulated by the goal (FiLM, Perez et al. 2018).

Parameter names are those of the public checkpoints: torchvision's and timm's for the ResNet itself (He et al. 2015).
Neither library is used: timm needs torchvision, whose wheels on PyPI do not load beside a CPU build of torch.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policy_models.mode.config import ImageConfig

_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}


class _Residual(nn.Module):
    """What both kinds of residual block share: the shortcut, and an optional modulation before the sum."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))
            if stride != 1 or channels_in != channels_out
            else None
        )

    def forward(self, x: Tensor, film: tuple[Tensor, Tensor] | None = None) -> Tensor:
        y = self.branch(x)
        if film is not None:
            gamma, beta = film
            y = gamma[:, :, None, None] * y + beta[:, :, None, None]
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BasicBlock(_Residual):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__(channels_in, channels, stride)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def branch(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C', h', w')."""
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Bottleneck(_Residual):
    """1x1, 3x3 (which strides), 1x1."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__(channels_in, 4 * channels, stride)
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)

    def branch(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C', h', w')."""
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(y))


class ResNet(nn.Module):
    """A ResNet without its classifier."""

    def __init__(self, blocks: Sequence[int], block: type[BasicBlock] | type[Bottleneck], channels: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        reached = channels
        for i, count in enumerate(blocks):
            stage = []
            for j in range(count):
                stage.append(block(reached, channels << i, 2 if i and not j else 1))
                reached = block.expansion * (channels << i)
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.widths = tuple(block.expansion * (channels << i) for i in range(len(blocks)))

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The stages in order."""
        return tuple(self.get_submodule(f"layer{i + 1}") for i in range(len(self.widths)))

    def stem(self, x: Tensor) -> Tensor:
        """Map images (B, 3, h, w) to (B, C, h / 4, w / 4)."""
        return F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)


class FiLM(nn.Module):
    """(1 + gamma(condition)) x + beta(condition), per channel; it begins as the identity."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(condition, channels)
        self.beta = nn.Linear(condition, channels)
        for layer in (self.gamma, self.beta):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Modulate (B, C, h, w) by (B, condition width)."""
        return (1 + self.gamma(condition)[:, :, None, None]) * x + self.beta(condition)[:, :, None, None]


class FiLMResNet(nn.Module):
    """ResNet-34 or -50, modulated after every stage."""

    def __init__(self, config: ImageConfig, condition: int) -> None:
        super().__init__()
        block = Bottleneck if config.encoder == "resnet50" else BasicBlock
        self.resnet = ResNet(_BLOCKS[config.encoder], block, config.channels)
        for i, width in enumerate(self.resnet.widths):
            self.add_module(f"film{i + 1}", FiLM(width, condition))
        self.token_width = self.resnet.widths[-1]

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        """Map scaled images (B, 3, h, w) and goals (B, condition width) to (B, token width)."""
        x = self.resnet.stem(image)
        for i, stage in enumerate(self.resnet.stages):
            x = self.get_submodule(f"film{i + 1}")(stage(x), condition)
        return x.mean((2, 3))


class _Modulation(nn.Module):
    def __init__(self, condition: int, channels: int) -> None:
        super().__init__()
        linear = nn.Linear(condition, 4 * channels)
        # Gains of one and offsets of zero: upstream begins from pretrained features and leaves this to chance.
        nn.init.zeros_(linear.weight)
        with torch.no_grad():
            linear.bias.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat_interleave(channels))
        self.modulation = nn.Sequential(nn.SiLU(), linear)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Return gamma and beta of the first block, then of the second; each (B, C)."""
        return self.modulation(condition).chunk(4, dim=-1)


class FiLMResNet18(ResNet):
    """ResNet-18, modulated inside every block, with a linear layer at its end."""

    def __init__(self, config: ImageConfig, condition: int) -> None:
        super().__init__(_BLOCKS["resnet18"], BasicBlock, config.channels)
        for i, width in enumerate(self.widths):
            self.add_module(f"film_module{i + 1}", _Modulation(condition, width))
        self.token_width = self.widths[-1]
        self.fc = nn.Linear(self.token_width, self.token_width)

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        """Map scaled images (B, 3, h, w) and goals (B, condition width) to (B, token width)."""
        x = self.stem(image)
        for i, stage in enumerate(self.stages):
            films = self.get_submodule(f"film_module{i + 1}")(condition)
            for j, block in enumerate(stage.children()):
                x = block(x, films[2 * j : 2 * j + 2])
        return self.fc(x.mean((2, 3)))


def make_encoder(config: ImageConfig, condition: int) -> FiLMResNet | FiLMResNet18:
    """Return one camera's encoder with fresh weights."""
    return FiLMResNet18(config, condition) if config.encoder == "resnet18" else FiLMResNet(config, condition)


def token_width(config: ImageConfig) -> int:
    """Return how wide an encoded image is."""
    return config.channels * 8 * (Bottleneck.expansion if config.encoder == "resnet50" else 1)


class Perceive(nn.Module):
    """The `perceive` graph: every camera's image and the goal in, one token per camera out."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageConfig, cameras: Sequence[str], condition: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({camera: make_encoder(config, condition) for camera in cameras})
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)

    def forward(self, goal: Tensor, *images: Tensor) -> Tensor:
        """Encode one observation of every robot.

        Args:
            goal: Embedded goals, (B, goal width).
            images: One per camera, in order: (B, h, w, 3) uint8 RGB.

        Returns:
            (B, cameras, token width).
        """
        tokens = [
            encoder((image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std, goal)
            for encoder, image in zip(self.encoders.values(), images, strict=True)
        ]
        return torch.stack(tokens, dim=1)


class _Affine(nn.Module):
    """A batch norm whose statistics are settled."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", (norm.bias - norm.running_mean * scale)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


@torch.no_grad()
def settled(perceive: Perceive) -> Perceive:
    """Return a copy for export whose convolutions share their weights with `perceive`.

    Exporters fold batch norms into convolutions, and would write every weight a second time. As a product and a sum
    they stay apart in the graph; engines fuse them when they load it.
    """
    tensors = (*perceive.parameters(), *perceive.buffers())
    copied = deepcopy(perceive, {id(tensor): tensor for tensor in tensors})
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, _Affine(child))
    return copied
