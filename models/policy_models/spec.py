"""What a policy needs and gives, as plain values: the nouns that everything else speaks of.

Letters in shapes: B batch, T observation steps, H action horizon, A action width, S state width, G goal steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from policy_models.directions import CollisionSpec

GoalKind = Literal["none", "state", "image", "text"]
ResizeRule = Literal["refuse", "area", "linear"]

# Unknown keys in a bundle's policy.yaml are refused; pydantic reads this attribute, and nothing here imports it.
_STRICT = {"extra": "forbid"}

# What the products of a network are computed in; everything else stays in float32.
Precision = Literal["f32", "f16", "bf16", "fp8", "int8"]


@dataclass(frozen=True)
class VectorSpec:
    """A vector of named numbers with units and limits.

    Attributes:
        names: What each element is, such as "x" or "gripper".
        units: Unit of each element, such as "m" or "rad"; one per name.
        low: Lowest allowed value of each element; empty where nothing limits it.
        high: Highest allowed value of each element; empty where nothing limits it.
    """

    __pydantic_config__ = _STRICT

    names: tuple[str, ...]
    units: tuple[str, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"names must be there and differ, got {', '.join(self.names) or 'none'}")
        for name in ("units", "low", "high"):
            count = len(getattr(self, name))
            if count != len(self.names) and (name == "units" or count):
                raise ValueError(f"{name} has {count} entries for {len(self.names)} names")

    @property
    def width(self) -> int:
        """How many numbers the vector holds."""
        return len(self.names)


@dataclass(frozen=True)
class CameraSpec:
    """One camera image, uint8 RGB, (height, width, 3).

    Attributes:
        name: The observation key that carries it.
        height: Rows that the network takes.
        width: Columns that the network takes.
        resize: What happens to an image of another size: "refuse", or OpenCV's "area" or "linear" resampling. It must
            be the rule of the training data: resamplers differ by up to 11 grey levels.
        crop: Fraction of height and width around the centre that is kept before resizing.
    """

    __pydantic_config__ = _STRICT

    name: str
    height: int
    width: int
    resize: ResizeRule = "refuse"
    crop: float = 1.0

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"camera {self.name!r} cannot have {self.width}x{self.height} pixels")
        if not 0 < self.crop <= 1 or (self.crop < 1 and self.resize == "refuse"):
            raise ValueError(f"camera {self.name!r}: crop is a fraction and needs a resize rule, got {self.crop}")


@dataclass(frozen=True)
class GoalSpec:
    """What tells the policy where to go.

    Attributes:
        kind: "none", "state" (a state vector), "image" or "text".
        length: How many goal frames, G; a single one may be sent without that axis.
        required: Whether an observation without a goal is refused. If not, it is answered goal-free.
        camera: What a goal image is resized to; for goals of kind "image".
        examples: Instructions that the policy was trained to follow; for goals of kind "text".
        longest: Characters that an instruction may have.
    """

    __pydantic_config__ = _STRICT

    kind: GoalKind = "none"
    length: int = 1
    required: bool = True
    camera: CameraSpec | None = None
    examples: tuple[str, ...] = ()
    longest: int = 1000

    def __post_init__(self) -> None:
        if (self.kind == "image") != (self.camera is not None):
            raise ValueError("goal images need a goal.camera, and nothing else has one")


@dataclass(frozen=True)
class SamplerSpec:
    """How a diffusion policy is sampled unless a request says otherwise.

    Attributes:
        sampler: A name from `diffusion.samplers.SAMPLERS`.
        schedule: A name from `diffusion.schedules.SCHEDULES`.
        steps: Denoising steps.
        sigma_min: Lowest positive noise level.
        sigma_max: Highest noise level.
        rho: Curvature of the schedules that have one.
        guidance: Classifier-free guidance lambda: 0 goal-free, 1 conditional, above 1 guided.
    """

    __pydantic_config__ = _STRICT

    sampler: str
    schedule: str
    steps: int
    sigma_min: float
    sigma_max: float
    rho: float = 7.0
    guidance: float = 1.0


@dataclass(frozen=True)
class Box:
    """An axis-aligned box over some of an action's numbers, such as the x, y and z of an end effector.

    Attributes:
        names: Which numbers it holds.
        low: Lowest allowed value of each, in the action's units.
        high: Highest allowed value of each.
    """

    __pydantic_config__ = _STRICT

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"a box needs names that differ, got {', '.join(self.names) or 'none'}")
        for side in ("low", "high"):
            if len(getattr(self, side)) != len(self.names):
                raise ValueError(f"{side} has {len(getattr(self, side))} entries for {len(self.names)} names")
        for name, low, high in zip(self.names, self.low, self.high, strict=True):
            if not (low < high and math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"{name!r}: low must be below high, and both finite, got {low} and {high}")


@dataclass(frozen=True)
class MotionLimits:
    """How fast actions may change, and the box that they stay in.

    The limits are on derivatives of the action itself, whatever it means: where an action is a position, `velocity`
    limits the robot's velocity; where it is a velocity or a force, `velocity` limits how fast that changes.

    Attributes:
        velocity: Largest absolute first derivative of each number, in its unit per s; None where nothing limits it,
            empty if that is everywhere.
        acceleration: Largest absolute second derivative, per s^2; likewise.
        jerk: Largest absolute third derivative, per s^3; likewise.
        workspace: Narrower than the action's own limits, in some of its numbers.
    """

    __pydantic_config__ = _STRICT

    velocity: tuple[float | None, ...] = ()
    acceleration: tuple[float | None, ...] = ()
    jerk: tuple[float | None, ...] = ()
    workspace: Box | None = None

    def __post_init__(self) -> None:
        for name in ("velocity", "acceleration", "jerk"):
            for limit in getattr(self, name):
                if limit is not None and not 0 < limit < math.inf:
                    raise ValueError(f"{name} limits must be positive numbers, or null for none, got {limit}")

    def check(self, action: VectorSpec) -> None:
        """Raise ValueError unless these can be limits of such an action."""
        for name in ("velocity", "acceleration", "jerk"):
            count = len(getattr(self, name))
            if count not in (0, action.width):
                raise ValueError(f"motion.{name} has {count} entries for {action.width} action names")
        if self.workspace and (unknown := set(self.workspace.names) - set(action.names)):
            raise ValueError(
                f"motion.workspace names {', '.join(map(repr, sorted(unknown)))}; "
                f"an action has {', '.join(map(repr, action.names))}"
            )


@dataclass(frozen=True)
class ReasoningSpec:
    """How a policy that reasons in words does it unless a request says otherwise.

    Attributes:
        tokens: The most tokens of one reasoning.
        budget_s: The most time for one; it then acts on what it has.
        every_s: How old a reasoning may become before the next begins.
    """

    __pydantic_config__ = _STRICT

    tokens: int
    budget_s: float = 10.0
    every_s: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens < 1 or not self.budget_s > 0 or not self.every_s >= 0:
            raise ValueError(
                "reasoning needs at least one token and some time, "
                f"got {self.tokens} tokens, {self.budget_s} s and {self.every_s} s"
            )


@dataclass(frozen=True)
class PolicySpec:
    """Everything a client, an engine or a page must know about one policy. Written once, in the bundle.

    Attributes:
        cameras: The images of one observation.
        state: Proprioception; None if the policy sees images alone.
        goal: What tells the policy where to go.
        action: What one action holds, with its limits in the robot's units.
        horizon: Actions in a chunk, H.
        step_s: Time between two actions of a chunk.
        window: Observations that the policy looks back on, T.
        sampler: How it is sampled; None for policies that are not diffusion policies.
        motion: How fast actions may change; None if nothing but their own limits holds them.
        reasoning: How it reasons in words; None for policies that do not.
        collision: The directions whose collisions it predicts; None for policies that predict none.
    """

    __pydantic_config__ = _STRICT

    action: VectorSpec
    horizon: int
    step_s: float
    state: VectorSpec | None = None
    cameras: tuple[CameraSpec, ...] = ()
    goal: GoalSpec = field(default_factory=GoalSpec)
    window: int = 1
    sampler: SamplerSpec | None = None
    motion: MotionLimits | None = None
    reasoning: ReasoningSpec | None = None
    collision: CollisionSpec | None = None

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.window < 1 or not self.step_s > 0:
            raise ValueError(
                f"horizon, window and step_s must be positive, got {self.horizon}, {self.window} and {self.step_s}"
            )
        cameras = [camera.name for camera in self.cameras]
        if len(set(cameras)) != len(cameras):
            raise ValueError(f"two cameras share a name: {', '.join(cameras)}")
        if taken := {"", "state", "goal", "prompt"}.intersection(cameras):
            raise ValueError(f"no camera can be called {', '.join(map(repr, taken))}: it means something else")
        if self.goal.kind == "state" and self.state is None:
            raise ValueError("a state goal needs a state")
        if self.collision is not None and self.collision.camera not in cameras:
            raise ValueError(f"collision.camera {self.collision.camera!r} is none of the cameras: {', '.join(cameras)}")
        if self.motion is not None:
            self.motion.check(self.action)


@dataclass(frozen=True)
class Observation:
    """One observation that fits its spec; made by checking, never by hand.

    Attributes:
        images: RGB images by camera name, (height, width, 3) uint8.
        state: (S,) float32 in the robot's units, or None.
        goal: (G, S) float32, a (height, width, 3) uint8 image, an instruction, or None.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray | None
    goal: np.ndarray | str | None


@dataclass(frozen=True, eq=False)
class Reasoning:
    """What a policy thinks, in words and as its action head takes it.

    Attributes:
        text: The words; empty if there are none.
        features: (C,) float32; None where nothing is injected.
        ended: What ended it: "complete" (the policy itself), "tokens" or "time" (the most that there may be of either),
            "given" (a client said it), "none".
        about: The observation that it is about, if what the policy made of that is kept in `seen`.
        seen: Named arrays that need not be computed again for `about`.
    """

    text: str = ""
    features: np.ndarray | None = None
    ended: Literal["complete", "tokens", "time", "given", "none"] = "none"
    about: Observation | None = None
    seen: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Continuation:
    """The chunk that the robot is playing, as the next one is to go on from it.

    Attributes:
        actions: (H, A) float32, in the robot's units; row 0 is due when the observation was captured. Rows behind the
            end of that chunk repeat its last.
        weights: (H,) float32, how much each row of the new chunk is pulled towards it: 1 for rows that will be played
            before the new chunk arrives, 0 for rows that are free.
        strength: Highest weight of the guidance, beta of Black et al. 2025.
        gradients: Whether pulls go through the denoiser's Jacobian, which the engine must be able to do.
        warm_steps: Begin at the noise level that leaves this many steps, from `actions` instead of from noise alone;
            None takes all steps.
        noise: Part of the first noise that sampling begins with. Less than 1 makes likelier chunks, which agree more.
    """

    actions: np.ndarray
    weights: np.ndarray
    strength: float
    gradients: bool = False
    warm_steps: int | None = None
    noise: float = 1.0


@dataclass(frozen=True)
class SamplingOptions:
    """What one request asks of the sampler; None leaves the bundle's default.

    Attributes:
        seed: Seeds every random draw of this chunk.
        steps: Denoising steps.
        sampler: A name from `diffusion.samplers.SAMPLERS`.
        guidance: Classifier-free guidance lambda.
        continuation: What the chunk goes on from; None begins from nothing.
        reasoning: What a policy that reasons acts on; None lets it reason first.
    """

    seed: int
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    continuation: Continuation | None = None
    reasoning: Reasoning | None = None
