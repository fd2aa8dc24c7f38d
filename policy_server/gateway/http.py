"""The HTTP door: one chunk per request, in JSON or msgpack."""

import asyncio
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse

from policy_client.codec import DecodeError, pack, unpack
from policy_models.spec import PolicySpec
from policy_server.catalog import Catalog, ServedPolicy
from policy_server.errors import MalformedMessage, MessageTooBig
from policy_server.gateway.auth import tenant_of
from policy_server.gateway.json_arrays import from_json, to_json
from policy_server.gateway.traffic import Traffic
from policy_server.runtime.options import RequestOptions, read_options
from policy_server.runtime.request import Request as RuntimeRequest

_MSGPACK = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")
_BODY_S = 30.0
_spec_adapter = TypeAdapter(PolicySpec)

ModelT = TypeVar("ModelT", bound=BaseModel)
PolicyName = Annotated[str, Path(description="A policy's name, as `GET /v1/policies` lists them.")]


class ActRequest(BaseModel):
    """One observation, and what is asked of the policy."""

    model_config = ConfigDict(extra="forbid")

    observation: dict[str, Any] = Field(
        description=(
            "The policy's inputs by name. Vectors are lists of numbers in the units of the spec. Images are "
            '{"base64": ...} around JPEG or PNG bytes, or {"__numpy__": base64, "dtype": "|u1", "shape": [H, W, 3]}. '
            "In msgpack, arrays and encoded bytes travel as such."
        )
    )
    # Checked by `read_options`, so that every door refuses an option in the same words.
    options: Annotated[Any, WithJsonSchema(RequestOptions.model_json_schema())] = None
    session: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="Names an episode, for policies that look back on earlier observations. Ends after ten minutes.",
    )


class ActResponse(BaseModel):
    """One chunk of future actions."""

    actions: list[list[float]] = Field(description="(H, A), in the robot's units; row 0 is due now.")
    step_s: float = Field(description="Time between two rows.")
    policy: str
    version: str = Field(description="The version of the policy that answered; it can change between two chunks.")
    engine: str
    seed: int = Field(description="Send it back as `options.seed` to get this chunk again.")
    clamped: int = Field(description="How many numbers were moved to the limits of the spec.")
    infer_ms: float
    reasoning: str | None = Field(None, description="What it acts on, of a policy that reasons in words.")


class AskRequest(BaseModel):
    """A question about a scene."""

    model_config = ConfigDict(extra="forbid")

    observation: dict[str, Any] = Field(description="As in `act`.")
    question: str = Field(min_length=1, max_length=4000, examples=["What is on the table?"])


class AskResponse(BaseModel):
    """What the policy says to it."""

    answer: str
    ended: str = Field(description="`complete`, or `tokens` or `time` where it had more to say than it may.")


class ErrorDetails(BaseModel):
    """What went wrong."""

    code: str = Field(description="Stable name for programs.", examples=["shape_mismatch"])
    message: str = Field(description="Which field, what was got, what was wanted.")


class ErrorResponse(BaseModel):
    """The body of every refusal."""

    error: ErrorDetails


class PolicySummary(BaseModel):
    """One line of the list of policies."""

    name: str
    version: str
    family: str
    description: str
    engine: str
    default: bool = Field(description="Whether this policy answers at `/`.")


def make_router(catalog: Catalog, traffic: Traffic, max_message_bytes: int) -> APIRouter:
    """Return the HTTP routes over one catalog."""
    router = APIRouter(responses={code: {"model": ErrorResponse} for code in (400, 401, 404, 413, 422, 503, 504)})

    @router.get("/healthz", tags=["health"], response_class=PlainTextResponse, summary="Is the process alive?")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("OK\n")  # openpi's clients compare these bytes

    @router.get("/readyz", tags=["health"], response_class=PlainTextResponse, summary="May robots be sent here?")
    async def readyz() -> PlainTextResponse:
        # The port opens only once every policy is loaded, replayed and warm; what can be amiss came later.
        if traffic.draining:
            return PlainTextResponse("draining\n", 503)
        lost = [policy.bundle.name for policy in catalog if not policy.runtime.version.inference.reachable]
        return PlainTextResponse(f"unreachable: {', '.join(lost)}\n", 503) if lost else PlainTextResponse("ready\n")

    @router.get("/v1/policies", tags=["policies"], summary="Which policies are served?")
    async def list_policies() -> list[PolicySummary]:
        return [_summary(policy, catalog.default) for policy in catalog]

    @router.get("/v1/policies/{name}", tags=["policies"], summary="What does one policy need and give?")
    async def show_policy(name: PolicyName) -> dict[str, Any]:
        policy = catalog[name]
        manifest = policy.bundle.manifest
        return {
            **_summary(policy, catalog.default).model_dump(),
            "spec": _spec_adapter.dump_python(manifest.spec, mode="json"),
            "inputs": policy.loaded.version.inputs,
            "licence": manifest.licence,
            "provenance": manifest.provenance,
            "results": manifest.results,
            "golden_drift": policy.loaded.drift,
            "chunk_ms": policy.loaded.chunk_ms,
            "retiring": policy.runtime.retiring,
            "example": _example(policy),
        }

    @router.post(
        "/v1/policies/{name}/act",
        tags=["act"],
        summary="Answer one observation with a chunk of actions.",
        response_model=ActResponse,
        response_model_exclude_none=True,
        openapi_extra={"requestBody": _request_body(catalog)},
    )
    async def act(name: PolicyName, request: Request) -> Response:
        policy = catalog[name]
        body, in_msgpack = await _read_request(request, ActRequest, max_message_bytes)
        with traffic:
            runtime = policy.runtime
            session = runtime.sessions.get(body.session) if body.session else runtime.begin_session()
            options = read_options(body.options)
            chunk = await runtime.act(
                session, RuntimeRequest(body.observation, options, tenant=tenant_of(request.scope))
            )
        reply = {
            "actions": chunk.actions if in_msgpack else chunk.actions.tolist(),
            "step_s": chunk.step_s,
            "policy": name,
            "version": chunk.version,
            "engine": chunk.engine,
            "seed": chunk.seed,
            "clamped": chunk.guard.clamped,
            "infer_ms": chunk.infer_ms,
            **({} if chunk.thought is None else {"reasoning": chunk.thought.reasoning.text}),
        }
        return Response(pack(reply), media_type=_MSGPACK[0]) if in_msgpack else JSONResponse(reply)

    @router.post(
        "/v1/policies/{name}/ask",
        tags=["act"],
        summary="Ask a policy that reasons in words about a scene.",
        response_model=AskResponse,
        openapi_extra={"requestBody": _body_of(AskRequest)},
    )
    async def ask(name: PolicyName, request: Request) -> Response:
        policy = catalog[name]
        body, in_msgpack = await _read_request(request, AskRequest, max_message_bytes)
        with traffic:
            said = await policy.runtime.ask(body.observation, body.question, tenant_of(request.scope))
        reply = {"answer": said.text, "ended": said.ended}
        return Response(pack(reply), media_type=_MSGPACK[0]) if in_msgpack else JSONResponse(reply)

    @router.delete("/v1/policies/{name}/sessions/{session}", tags=["act"], summary="End an episode.", status_code=204)
    async def end_session(name: PolicyName, session: str) -> Response:
        catalog[name].runtime.sessions.forget(session)
        return Response(status_code=204)

    return router


def _summary(policy: ServedPolicy, default: str) -> PolicySummary:
    manifest = policy.bundle.manifest
    return PolicySummary(
        name=manifest.name,
        version=manifest.version,
        family=manifest.family,
        description=manifest.description,
        engine=policy.loaded.version.engine,
        default=manifest.name == default,
    )


async def _read_request(request: Request, model: type[ModelT], limit_bytes: int) -> tuple[ModelT, bool]:
    """Return what a request holds, and whether it came in msgpack."""
    announced_bytes = int(request.headers.get("content-length", 0))
    if announced_bytes > limit_bytes:
        raise MessageTooBig(announced_bytes, limit_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > limit_bytes:
                    raise MessageTooBig(None, limit_bytes)
    except TimeoutError:
        raise MalformedMessage(f"the body was not complete after {_BODY_S:g} s") from None
    except ClientDisconnect as error:  # nobody hears this answer, but it is no failure of ours
        raise MalformedMessage("the connection broke before the body was complete") from error
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    raw: Any
    if media_type in _MSGPACK:
        try:
            raw = unpack(bytes(body))
        except DecodeError as error:
            raise MalformedMessage(str(error)) from error
    elif media_type == "application/json":
        try:
            raw = from_json(json.loads(body))
        except (ValueError, RecursionError) as error:
            raise MalformedMessage(f"the body is not JSON: {error}") from error
    else:
        raise MalformedMessage(f"content type {media_type!r}, expected application/json or {_MSGPACK[0]}")
    if not isinstance(raw, dict):
        raise MalformedMessage(f"the body is a {type(raw).__name__}, expected a map with 'observation'")
    try:
        return model.model_validate(raw), media_type in _MSGPACK
    except ValidationError as error:
        details = error.errors()[0]
        raise MalformedMessage(f"{'.'.join(map(str, details['loc']))!r}: {details['msg']}") from error


def _example(policy: ServedPolicy) -> dict[str, Any]:
    return {"observation": to_json(policy.loaded.example), "options": {"seed": 7}}


def _request_body(catalog: Catalog) -> Mapping[str, Any]:
    return _body_of(
        ActRequest,
        {policy.bundle.name: {"value": _example(policy)} for policy in catalog if not policy.bundle.spec.cameras},
    )


def _body_of(model: type[BaseModel], examples: Mapping[str, Any] = MappingProxyType({})) -> Mapping[str, Any]:
    return {
        "required": True,
        "content": {
            "application/json": {"schema": model.model_json_schema(), "examples": dict(examples)},
            _MSGPACK[0]: {"schema": {"type": "string", "format": "binary"}},
        },
    }
