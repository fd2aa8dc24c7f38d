"""What an operator changes while robots are served."""

from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field

from policy_server.catalog import Catalog
from policy_server.errors import Forbidden
from policy_server.gateway.auth import admits
from policy_server.settings import Settings


class SwapRequest(BaseModel):
    """Which bundle takes over."""

    model_config = ConfigDict(extra="forbid")

    bundle: FilePath = Field(description="Folder of the bundle, on the server's machine.")


class SwapResponse(BaseModel):
    """What answers from now on."""

    name: str
    version: str
    engine: str
    golden_drift: float
    chunk_ms: float
    retiring: tuple[str, ...] = Field(description="Older versions that some session still holds.")


def make_admin_router(catalog: Catalog, settings: Settings) -> APIRouter:
    """Return the routes that change what is served."""
    router = APIRouter(tags=["admin"])

    # The body must be JSON, which a web page of somebody else cannot send here without being asked first.
    @router.put("/v1/policies/{name}", summary="Serve another version of a policy; no request fails meanwhile.")
    async def swap(name: Annotated[str, Path()], body: SwapRequest, request: Request) -> SwapResponse:
        _check_operator(request, settings)
        served = await catalog.swap(name, body.bundle)
        loaded = served.loaded
        return SwapResponse(
            name=name,
            version=loaded.version.label,
            engine=loaded.version.engine,
            golden_drift=loaded.drift,
            chunk_ms=loaded.chunk_ms,
            retiring=served.runtime.retiring,
        )

    return router


def _check_operator(request: Request, settings: Settings) -> None:
    if settings.admin_keys:
        if not admits(request.headers, settings.admin_keys):
            raise Forbidden("this takes an admin key (POLICY_SERVER_ADMIN_KEYS), sent as 'Authorization: Bearer <key>'")
    elif not settings.is_local:
        raise Forbidden(
            "a server that other machines can reach changes policies only with POLICY_SERVER_ADMIN_KEYS set"
        )
