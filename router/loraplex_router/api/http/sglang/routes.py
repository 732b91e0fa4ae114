"""SGLang's /load_lora_adapter and /unload_lora_adapter."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from loraplex_protos.errors import LoraplexError
from loraplex_protos.generation_pb2 import ADAPTER_TIER_DEVICE, ADAPTER_TIER_HOST
from loraplex_router.api.http.call import Call, RouteCall
from loraplex_router.api.http.errors import Responses, describe, document_errors
from loraplex_router.api.http.json_body import JsonRoute
from loraplex_router.api.http.named_loads import NamedLoad, NamedUnload, load_named, unload_named
from loraplex_router.vocabulary.references import AdapterReference

TIERS = ADAPTER_TIER_HOST, ADAPTER_TIER_DEVICE  # of adapters that are loaded


class Load(NamedLoad):
    pinned: bool | None = Field(default=None, description="Keep it on the device until it is unpinned or unloaded.")


class Result(BaseModel):
    success: bool
    error_message: str = ""
    loaded_adapters: dict[str, str] = Field(description="Those in memory, by name; of the loaded one, with its path.")
    warnings: list[str] = Field(default=[], description="What is doubtful about the loaded adapter.")


ERRORS: Responses = document_errors(Result, {400: "A field is wrong.", 404: "No such adapter.", 409: "It is in use."})

loading = APIRouter(tags=["Adapters"], route_class=JsonRoute)
unloading = APIRouter(tags=["Adapters"], route_class=JsonRoute)


@loading.post("", responses=ERRORS)
async def load_lora_adapter(body: Load, call: Call) -> Result:
    """Loads an adapter, as SGLang does. It is served under its own name, or with --adapter-registry under any."""
    status = await load_named(body, call)
    if body.pinned:
        await call.service.adapters.pin(AdapterReference(body.lora_name), call.key)
    loaded = {**await _loaded(call), body.lora_name: body.lora_path or body.lora_name}
    return Result(success=True, loaded_adapters=loaded, warnings=list(status.warnings))


@unloading.post("", responses=ERRORS)
async def unload_lora_adapter(body: NamedUnload, call: Call) -> Result:
    """Unloads an adapter once no sequence needs it, as SGLang does. A name in the registry, or of an upload, is
    removed."""
    await unload_named(body, call, wait=True)
    return Result(success=True, loaded_adapters=await _loaded(call))


def write_error(error: LoraplexError) -> dict[str, Any]:
    return {"success": False, "error_message": describe(error), "loaded_adapters": {}}


async def _loaded(call: RouteCall) -> dict[str, str]:
    pages = call.service.adapters.pages(call.key)
    listed = [each async for page in pages for each in page.adapters if each.tier in TIERS]
    return {each.id: each.id for each in listed}
