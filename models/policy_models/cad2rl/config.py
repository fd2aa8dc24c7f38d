"""The shape of one CAD2RL network, and how its predictions become velocities."""

from dataclasses import dataclass, field
from typing import Literal

Head = Literal["grid", "left-right-straight"]


@dataclass(frozen=True)
class Steering:
    """How a grid of collision probabilities becomes a velocity.

    Attributes:
        speed_m_s: Along a direction that is surely free.
        turn_rad_s: Highest turning rate.
        turn_gain_hz: Turning rate for each rad between the camera's axis and the direction taken.
        straight: What turning away by half the field of view costs, as a probability.
        calm: Up to this probability the robot flies at full speed.
        blocked: From this probability on a direction is not flown at all.
    """

    __pydantic_config__ = {"extra": "forbid"}

    speed_m_s: float = 1.0
    turn_rad_s: float = 1.5
    turn_gain_hz: float = 2.0
    straight: float = 0.05
    calm: float = 0.3
    blocked: float = 0.9

    def __post_init__(self) -> None:
        for name in ("speed_m_s", "turn_rad_s", "turn_gain_hz"):
            if not getattr(self, name) > 0:
                raise ValueError(f"steering.{name} must be positive, got {getattr(self, name)}")
        if self.straight < 0 or not 0 <= self.calm < self.blocked <= 1:
            raise ValueError(
                "steering needs 0 <= calm < blocked <= 1 and straight >= 0, "
                f"got {self.calm}, {self.blocked} and {self.straight}"
            )


@dataclass(frozen=True)
class Cad2rlConfig:
    """A fully convolutional network in the manner of VGG: stages of 3x3 convolutions, then two wide layers.

    Each stage but the last ends in pooling, by 2 until `stride` is reached; later stages are dilated instead.

    Attributes:
        image: Rows and columns of pixels.
        rows: Of the grid of directions.
        columns: Of the grid of directions.
        widths: Channels of each stage.
        depths: Convolutions of each stage.
        stride: Pixels for one position of the last features.
        wide: Channels of the two layers behind the stages, fc6 and fc7 of VGG.
        wide_dilation: Of the first of these, a 3x3 convolution.
        batch_norm: Whether every convolution of a stage is followed by batch normalisation.
        dropout: Of the wide layers, in training.
        head: "grid" for a probability of each direction; "left-right-straight" for the baseline that chooses one of
            three.
        steering: What is done with the predictions.
    """

    __pydantic_config__ = {"extra": "forbid"}

    image: int
    rows: int
    columns: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stride: int
    wide: int
    wide_dilation: int
    batch_norm: bool = False
    dropout: float = 0.0
    head: Head = "grid"
    steering: Steering = field(default_factory=Steering)

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.depths) or not self.widths or min(*self.widths, *self.depths, self.wide) < 1:
            raise ValueError(
                f"each stage needs a width and a depth, got widths {self.widths}, depths {self.depths} and {self.wide}"
            )
        if self.stride not in (2**i for i in range(len(self.widths))):
            raise ValueError(f"{len(self.widths)} stages cannot have a stride of {self.stride}")
        if self.image < self.stride:
            raise ValueError(f"an image of {self.image} pixels is smaller than the stride of {self.stride}")
        if self.head == "left-right-straight" and self.columns < 3:
            raise ValueError(f"left, right and straight need 3 columns, got {self.columns}")

    @property
    def features(self) -> int:
        """Positions of the last features, along each axis."""
        side = self.image
        for _ in range(self.stride.bit_length() - 1):
            side = (side + 1) // 2
        return side


def vgg16() -> Cad2rlConfig:
    """Return VGG16 made fully convolutional: 321x321 pixels at stride 8 give a grid of 41x41 directions.

    The wide layers have 1024 channels and a dilation of 12, as DeepLab's LargeFOV has (Chen et al. 2015), since the
    paper's own numbers are not known to us.
    """
    return Cad2rlConfig(
        image=321,
        rows=41,
        columns=41,
        widths=(64, 128, 256, 512, 512),
        depths=(2, 2, 3, 3, 3),
        stride=8,
        wide=1024,
        wide_dilation=12,
        dropout=0.5,
    )


def small(*, image: int = 64, rows: int = 9, columns: int = 13, head: Head = "grid") -> Cad2rlConfig:
    """Return the network that ships: a million bytes, and milliseconds on one CPU core."""
    return Cad2rlConfig(
        image=image,
        rows=rows,
        columns=columns,
        widths=(12, 24, 32, 48, 64),
        depths=(1, 1, 2, 2, 2),
        stride=4,
        wide=64,
        wide_dilation=4,
        batch_norm=True,
        head=head,
    )
