"""What one robot's policy thinks, beside what it does: when it reasons, and which reasoning a chunk acts on."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field, TypeAdapter, ValidationError

from policy_models.spec import Observation, PolicySpec, Reasoning
from policy_server.errors import InvalidOption
from policy_server.runtime.deadline import Deadline
from policy_server.runtime.inference import ThinkingInference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Thought:
    """A reasoning of one session.

    Attributes:
        number: Counts the session's reasonings from 1; 0 where nothing was reasoned.
        reasoning: It; of one that goes on, as far as it has come.
        instruction: What it follows.
        begun_at_s: Monotonic time at which it began.
        goes_on: Whether it is not complete yet.
    """

    number: int
    reasoning: Reasoning
    instruction: str
    begun_at_s: float
    goes_on: bool = False


@dataclass(frozen=True)
class Scene:
    """An observation, and who could think about it."""

    observation: Observation
    inference: ThinkingInference
    spec: PolicySpec
    deadline: Deadline
    tenant: str

    @property
    def instruction(self) -> str:
        """The instruction of the observation."""
        return str(self.observation.goal or "")


class Mind:
    """The thoughts of one session.

    Attributes:
        latest: The newest that is complete; None before the first.
        listen: Is told of every thought as it grows, and once it is complete.
    """

    def __init__(self) -> None:
        self.latest: Thought | None = None
        self.listen: Callable[[Thought], None] | None = None
        self._count = 0
        self._under_way: tuple[str, asyncio.Task[Thought]] | None = None

    @property
    def is_reasoning(self) -> bool:
        """Whether a thought is under way."""
        return self._under_way is not None

    def clear(self) -> None:
        """Forget everything: an episode ended, or another version thinks from now on."""
        self.latest = None
        self._stop()

    def reason(self, scene: Scene) -> "asyncio.Task[Thought]":
        """Begin to reason about a scene, unless that is under way for its instruction; return what will come of it."""
        if self._under_way is not None and self._under_way[0] == scene.instruction:
            return self._under_way[1]
        self._stop()
        task = asyncio.create_task(self._reason(scene))
        self._under_way = scene.instruction, task
        task.add_done_callback(self._done)
        return task

    async def hear(self, scene: Scene, text: str) -> Thought:
        """Take a text for what was reasoned."""
        latest = self.latest
        said = (latest.reasoning.ended, latest.reasoning.text, latest.instruction) if latest else None
        if latest is not None and said == ("given", text, scene.instruction):
            return latest
        begun_at_s = time.monotonic()
        reasoning = await scene.inference.hear(scene.observation, text, scene.deadline, scene.tenant)
        return self._complete(self._next_number(), reasoning, scene, begun_at_s)

    async def _reason(self, scene: Scene) -> Thought:
        assert scene.spec.reasoning is not None, "only what reasons is asked to"
        number, begun_at_s = self._next_number(), time.monotonic()

        def said(text: str) -> None:
            self._tell(Thought(number, Reasoning(text), scene.instruction, begun_at_s, goes_on=True))

        reasoning = await scene.inference.reason(
            scene.observation, until_s=begun_at_s + scene.spec.reasoning.budget_s, tenant=scene.tenant, listen=said
        )
        return self._complete(number, reasoning, scene, begun_at_s)

    def _next_number(self) -> int:
        self._count += 1
        return self._count

    def _complete(self, number: int, reasoning: Reasoning, scene: Scene, begun_at_s: float) -> Thought:
        self.latest = Thought(number, reasoning, scene.instruction, begun_at_s)
        self._tell(self.latest)
        return self.latest

    def _tell(self, thought: Thought) -> None:
        if self.listen is not None:
            self.listen(thought)

    def _stop(self) -> None:
        if self._under_way is not None:
            self._under_way[1].cancel()
            self._under_way = None

    def _done(self, task: "asyncio.Task[Thought]") -> None:
        if self._under_way is not None and self._under_way[1] is task:
            self._under_way = None
        if not task.cancelled() and (error := task.exception()):
            logger.info("a reasoning was given up: %s", error)  # whoever waits for it is told by the task


class Thinking(Protocol):
    """A way to find what a chunk acts on. Frozen, so that sessions can share it."""

    mode: ClassVar[str]

    async def choose(self, mind: Mind, scene: Scene) -> Thought:
        """Return what the chunk of a scene acts on."""


@dataclass(frozen=True)
class Latest:
    """The newest reasoning about this instruction. The next begins when that is too old, and is not waited for.

    Attributes:
        every_s: How old a reasoning may become before the next begins; None for what the policy's spec says.
    """

    __pydantic_config__ = {"extra": "forbid"}
    mode: ClassVar[str] = "latest"

    every_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] | None = None

    async def choose(self, mind: Mind, scene: Scene) -> Thought:
        """See `Thinking.choose`."""
        latest = mind.latest
        if latest is None or latest.instruction != scene.instruction or latest.reasoning.ended == "given":
            # Others may wait for it too, and this chunk's deadline is not the reasoning's.
            return await asyncio.shield(mind.reason(scene))
        assert scene.spec.reasoning is not None, "only what reasons is asked to"
        every_s = scene.spec.reasoning.every_s if self.every_s is None else self.every_s
        if not mind.is_reasoning and time.monotonic() - latest.begun_at_s >= every_s:
            mind.reason(scene)
        return latest


@dataclass(frozen=True)
class Fresh:
    """A reasoning about the very observation, as the paper has it; the chunk waits for it."""

    __pydantic_config__ = {"extra": "forbid"}
    mode: ClassVar[str] = "fresh"

    async def choose(self, mind: Mind, scene: Scene) -> Thought:
        """See `Thinking.choose`."""
        if mind.is_reasoning:
            mind.clear()  # that is about another observation
        return await mind.reason(scene)


@dataclass(frozen=True)
class Without:
    """No reasoning: nothing is injected."""

    __pydantic_config__ = {"extra": "forbid"}
    mode: ClassVar[str] = "none"

    async def choose(self, mind: Mind, scene: Scene) -> Thought:
        """See `Thinking.choose`."""
        return Thought(0, Reasoning(), scene.instruction, time.monotonic())


@dataclass(frozen=True)
class Given:
    """What the client says. It is heard once, and holds for as long as the client says the same.

    Attributes:
        text: The words.
    """

    __pydantic_config__ = {"extra": "forbid"}
    mode: ClassVar[str] = "given"

    text: Annotated[str, Field(min_length=1, max_length=4000)]

    async def choose(self, mind: Mind, scene: Scene) -> Thought:
        """See `Thinking.choose`."""
        return await mind.hear(scene, self.text)


THINKINGS: Mapping[str, type[Thinking]] = {way.mode: way for way in (Latest, Fresh, Without, Given)}
LATEST = Latest()


def read_thinking(raw: Any) -> Thinking:
    """Return the way that came over a wire: a mode, or a map with `mode` and its keys; raises InvalidOption."""
    keys = dict(raw) if isinstance(raw, Mapping) else {"mode": raw}
    mode = keys.pop("mode", None)
    if not isinstance(mode, str) or mode not in THINKINGS:
        raise InvalidOption(f"'reasoning' is {mode!r}, expected one of {', '.join(THINKINGS)}")
    try:
        return TypeAdapter(THINKINGS[mode]).validate_python(keys)
    except ValidationError as error:
        details = error.errors()[0]
        where = ".".join(("reasoning", *map(str, details["loc"])))
        raise InvalidOption(f"{where!r}: {details['msg']}, got {details['input']!r}") from error
