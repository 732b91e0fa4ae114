"""Adapter administration: list, load and unload, as over gRPC, and under the names of vLLM's routes."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field

from loraplex_protos.errors import FieldViolation, InvalidRequestError, quote
from loraplex_router.api.http.api_key import api_key
from loraplex_router.api.http.json_body import JsonRoute
from loraplex_router.api.http.json_list import write_list
from loraplex_router.api.http.lorax.routes import ERRORS as LORAX_ERRORS
from loraplex_router.api.http.openai.routes import ERRORS as OPENAI_ERRORS
from loraplex_router.replicas.statuses import AdapterStatus
from loraplex_router.service.service import Service
from loraplex_router.vocabulary.references import AdapterReference

IN_USE = "Sequences still need the adapter."
NO_PINS = "As many adapters are pinned as can be."


class Adapter(BaseModel):
    """Where an adapter comes from, as in generation.proto."""

    id: str
    source: str = Field(default="", description="One of the server's, as local or hub. Empty: the first that has it.")
    revision: str = Field(default="", description="Branch, tag or commit of a hub repository.")
    token: str = Field(default="", description="For a private hub repository. Never logged.")


class AdapterName(BaseModel):
    """An adapter by where it comes from, or by its digest, which is the only name of merged ones."""

    id: str = ""
    source: str = ""
    revision: str = ""
    token: str = ""
    digest: str = Field(default="", description="As in the listing, and then nothing else.")

    def read(self) -> AdapterReference | str:
        if self.digest and self.id:
            raise InvalidRequestError(FieldViolation("digest", "give the digest or the id, not both"))
        return self.digest or AdapterReference(self.id, self.source, self.revision, self.token)


class Unload(AdapterName):
    wait: bool = Field(
        default=False,
        description="Let the sequences that need it end first, instead of refusing because of them. Requests that come "
        "meanwhile wait, and load it again.",
    )


class Residence(BaseModel):
    """An adapter in one replica."""

    replica: str
    tier: str
    running_sequences: int
    waiting_sequences: int
    pinned: bool


class Status(BaseModel):
    id: str = Field(description="of merged adapters, all of them, separated by commas")
    source: str
    revision: str
    state: str = Field(
        description="available (in the adapter directory), fetching, loaded, unloading, or broken (in the adapter "
        "directory, but it cannot be served)"
    )
    tier: str | None = Field(description="disk, host or device: the fastest place that holds it; null: being fetched")
    digest: str | None = Field(description="null while it is only on disk or being fetched, as are the next two")
    lora_rank: int | None
    size_bytes: int | None
    requests: int = Field(description="that wait or run")
    running_sequences: int
    waiting_sequences: int
    last_used: float | None = Field(description="when a request last came or ended, in seconds since 1970")
    pinned: bool = Field(description="on the device of one replica until it is unpinned or unloaded")
    residences: list[Residence] = Field(description="the replicas that have it in memory")
    warnings: list[str] = Field(description="what may be wrong with it though it is served")
    reason: str | None = Field(description="why it is broken")


class VllmLoad(BaseModel):
    lora_name: str
    lora_path: str | None = Field(default=None, description="The same name, or a path that ends in it.")


class VllmUnload(BaseModel):
    lora_name: str


def create_admin_routes(service: Service) -> APIRouter:
    routes = APIRouter(tags=["Adapters"], route_class=JsonRoute)
    loading = {status: error for status, error in LORAX_ERRORS.items() if status not in (429, 499)}
    in_use: dict[int | str, dict[str, Any]] = {409: {**LORAX_ERRORS[404], "description": IN_USE}}
    done: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    no_pins: dict[int | str, dict[str, Any]] = {409: {**LORAX_ERRORS[404], "description": NO_PINS}}
    v1_in_use: dict[int | str, dict[str, Any]] = {409: {**OPENAI_ERRORS[404], "description": IN_USE}}

    @routes.get("/adapters", responses={200: {"model": list[Status]}, 401: LORAX_ERRORS[401], 503: LORAX_ERRORS[503]})
    async def list_adapters(http: Request) -> Response:
        """The adapters that are loaded, and those that lie in the adapter directory."""
        statuses = await service.list_adapters(api_key(http))
        return StreamingResponse(write_list(map(_write, statuses)), media_type="application/json")

    @routes.post("/adapters/load", responses={200: {"model": Status}, **loading})
    async def load_adapter(body: Adapter, http: Request) -> Response:
        """Fetches and checks an adapter now; one that was loaded before is read again."""
        status = await service.load_adapter(_read(body), api_key(http))
        return JSONResponse(_write(status))

    @routes.post("/adapters/unload", response_class=Response, responses={**loading, **in_use})
    async def unload_adapter(body: Unload, http: Request) -> Response:
        """Frees what an adapter holds on the device and in host memory; refused while sequences need it, or waits."""
        await service.unload_adapter(body.read(), body.wait, api_key(http))
        return Response()

    @routes.post("/adapters/pin", responses={200: {"model": Status}, **loading, **no_pins})
    async def pin_adapter(body: AdapterName, http: Request) -> Response:
        """Brings an adapter to the device, where it stays. Answers once it is there."""
        return JSONResponse(_write(await service.pin_adapter(body.read(), api_key(http))))

    @routes.post("/adapters/unpin", responses={200: {"model": Status}, **loading})
    async def unpin_adapter(body: AdapterName, http: Request) -> Response:
        """The adapter may leave the device again when others need its place."""
        return JSONResponse(_write(await service.unpin_adapter(body.read(), api_key(http))))

    @routes.post("/v1/load_lora_adapter", response_class=Response, responses={**done, **OPENAI_ERRORS})
    async def vllm_load(body: VllmLoad, http: Request) -> Response:
        """vLLM's name of loading. An adapter is served under its own name, so the two given must agree."""
        path = body.lora_path or body.lora_name
        if path != body.lora_name and not path.endswith(f"/{body.lora_name}"):
            raise InvalidRequestError(FieldViolation("lora_path", f"must be, or end in, {quote(body.lora_name)}"))
        status = await service.load_adapter(AdapterReference(body.lora_name), api_key(http))
        done = f"Success: LoRA adapter '{body.lora_name}' added successfully."
        return PlainTextResponse("\n".join((done, *(f"Warning: {warning}" for warning in status.warnings))))

    @routes.post("/v1/unload_lora_adapter", response_class=Response, responses={**done, **OPENAI_ERRORS, **v1_in_use})
    async def vllm_unload(body: VllmUnload, http: Request) -> Response:
        """vLLM's name of unloading."""
        await service.unload_adapter(AdapterReference(body.lora_name), key=api_key(http))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return routes


def _read(body: Adapter) -> AdapterReference:
    return AdapterReference(body.id, body.source, body.revision, body.token)


def _write(status: AdapterStatus) -> dict[str, Any]:
    return {
        "id": status.id,
        "source": status.source,
        "revision": status.revision,
        "state": status.state.name.lower(),
        "tier": status.tier.name.lower() if status.tier else None,
        "digest": status.digest or None,
        "lora_rank": status.lora_rank or None,
        "size_bytes": status.size_bytes or None,
        "requests": status.requests,
        "running_sequences": status.running,
        "waiting_sequences": status.waiting,
        "last_used": status.last_used or None,
        "pinned": status.pinned,
        "residences": [
            {
                "replica": residence.replica,
                "tier": residence.tier.name.lower(),
                "running_sequences": residence.adapter.running,
                "waiting_sequences": residence.adapter.waiting,
                "pinned": residence.adapter.pinned,
            }
            for residence in status.residences
        ],
        "warnings": list(status.warnings),
        "reason": status.reason or None,
    }
