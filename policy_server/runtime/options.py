"""What a request may ask for besides an answer."""

import random
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from policy_models.diffusion.samplers import SAMPLERS
from policy_models.spec import SamplingOptions
from policy_server.errors import InvalidOption


def _known_sampler(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler {name!r}; there are: {', '.join(SAMPLERS)}")
    return name


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

    def sampling(self, row: int = 0) -> SamplingOptions:
        """Return what the policy's program needs to know, with a fresh seed unless one was asked for.

        Args:
            row: Place in a request that holds several observations; each has the seed after that of the one before.
        """
        seed = random.getrandbits(63) if self.seed is None else self.seed + row  # noqa: S311: a seed is no secret
        return SamplingOptions(seed, self.steps, self.sampler, self.guidance)


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
