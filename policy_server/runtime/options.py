"""What a request may ask for besides an answer."""

import random
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from policy_models.diffusion.samplers import SAMPLERS
from policy_models.spec import Continuation, Reasoning, SamplingOptions
from policy_server.errors import InvalidOption


def _known_sampler(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler {name!r}; there are: {', '.join(SAMPLERS)}")
    return name


class SmoothingOptions(BaseModel):
    """How a chunk is smoothed; see docs/safety.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sigma: float = Field(gt=0, le=1e6, allow_inf_nan=False, description="Deviation of the noise on the state.")
    samples: int = Field(32, ge=2, le=1024, description="Copies of the observation.")
    tolerance: float = Field(0.1, gt=0, lt=1, description="How far an action may move, as a fraction of its range.")
    confidence: float = Field(0.99, gt=0, lt=1)
    scale: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        (), description="Scale of each number of the state; without it their own units."
    )
    images_sigma: float | None = Field(
        None, gt=0, le=256, description="Deviation of the noise on images, in grey levels."
    )


class RequestOptions(BaseModel):
    """Options of one request; everything left out keeps the policy's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int | None = Field(None, ge=1, le=200, description="Denoising steps.", examples=[3])
    guidance: float | None = Field(
        None,
        ge=0,
        le=20,
        allow_inf_nan=False,
        description="Classifier-free guidance lambda: 0 goal-free, 1 conditional, above 1 guided.",
        examples=[1.0],
    )
    sampler: Annotated[str, AfterValidator(_known_sampler)] | None = Field(
        None, description=f"One of {', '.join(SAMPLERS)}.", examples=["ddim"]
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Same observation, same seed: same chunk.", examples=[7])
    budget_ms: float | None = Field(
        None,
        gt=0,
        le=600_000,
        allow_inf_nan=False,
        description="A chunk that comes later than this is worthless; it is then refused.",
        examples=[100],
    )

    continuity: Any = Field(
        None,
        description="How the chunk goes on from the session's last one: replace, rtc, ensemble or warm; or a map with "
        "`mode` and its keys.",
        examples=["rtc"],
    )
    reasoning: Any = Field(
        None,
        description="For policies that reason: what the chunk acts on, latest, fresh, none or given; or a map with "
        "`mode` and its keys.",
        examples=["latest"],
    )
    # Its schema is inlined: this one is part of another, and references would lead nowhere there.
    smoothing: Annotated[SmoothingOptions, WithJsonSchema(SmoothingOptions.model_json_schema())] | None = Field(
        None, description="Answer with the mean over copies of the observation with noise, and say how robust it is."
    )
    captured_ms: float | None = Field(
        None,
        allow_inf_nan=False,
        description="When the observation was true, by the robot's clock, from any origin. Without it: now.",
        examples=[81234.5],
    )
    delay_ms: float | None = Field(
        None,
        ge=0,
        le=600_000,
        allow_inf_nan=False,
        description="How long after that the robot begins to play the chunk, and goes on playing the last one. Without "
        "it the robot is taken to stand and wait for its answer.",
        examples=[120],
    )

    def sampling(
        self, row: int = 0, continuation: Continuation | None = None, reasoning: Reasoning | None = None
    ) -> SamplingOptions:
        """Return what the policy's program needs to know, with a fresh seed unless one was asked for.

        Args:
            row: Place in a request that holds several observations; each has the seed after that of the one before.
            continuation: What the chunk goes on from.
            reasoning: What it acts on.
        """
        seed = random.getrandbits(63) if self.seed is None else self.seed + row
        return SamplingOptions(seed, self.steps, self.sampler, self.guidance, continuation, reasoning)


DEFAULT_OPTIONS = RequestOptions()


def read_options(raw: Any) -> RequestOptions:
    """Check options that came over a wire; None means all defaults. Raises InvalidOption."""
    if raw is None:
        return DEFAULT_OPTIONS
    if not isinstance(raw, Mapping):
        raise InvalidOption(f"'options' is {type(raw).__name__}, expected a map")
    try:
        return RequestOptions.model_validate(raw)
    except ValidationError as error:
        details = error.errors()[0]
        where = ".".join(("options", *map(str, details["loc"])))
        reason = details["msg"].removeprefix("Value error, ")
        raise InvalidOption(f"{where!r}: {reason}, got {details['input']!r}") from error
