"""Adapters under names that the caller chooses, as the routes of other servers load and unload them."""

from pydantic import BaseModel, Field

from loraplex_protos.errors import AdapterConflictError, FieldViolation, InvalidRequestError, quote
from loraplex_protos.generation_pb2 import AdapterStatus
from loraplex_router.api.http.call import RouteCall
from loraplex_router.vocabulary.references import AdapterReference


class NamedLoad(BaseModel):
    lora_name: str
    lora_path: str | None = Field(
        default=None, description="The same name, or a path that ends in it; with --adapter-registry, any adapter's id."
    )
    load_inplace: bool | None = Field(
        default=None, description="Replace what has a name of the registry. An adapter's own name is always read again."
    )


class NamedUnload(BaseModel):
    lora_name: str


async def load_named(body: NamedLoad, call: RouteCall) -> AdapterStatus:
    """Loads an adapter under its own name, or with --adapter-registry under any: then it is registered as a version of
    that name. Raises AdapterConflictError if the name stands for another one."""
    path, adapters = body.lora_path or body.lora_name, call.service.adapters
    if path == body.lora_name or path.endswith(f"/{body.lora_name}"):
        return await adapters.load(AdapterReference(body.lora_name), call.key)
    if not adapters.registers:
        only = f"must be, or end in, {quote(body.lora_name)}; other names need a server with --adapter-registry"
        raise InvalidRequestError(FieldViolation("lora_path", only))
    if not body.load_inplace and adapters.has_name(body.lora_name, call.key):
        raise AdapterConflictError(f"{quote(body.lora_name)} exists: unload it, or set load_inplace to replace it")
    expected = None if body.load_inplace else 0
    return await adapters.register(body.lora_name, AdapterReference(path), expected, call.key)


async def unload_named(body: NamedUnload, call: RouteCall, wait: bool = False) -> None:
    """Unloads an adapter, or removes a name in the registry or of an upload. `wait`: for sequences that need an adapter
    under its own name, which otherwise is not unloaded."""
    adapters = call.service.adapters
    if adapters.has_name(body.lora_name, call.key):
        await adapters.remove(body.lora_name, expected_version=None, key=call.key)
    else:
        await adapters.unload(AdapterReference(body.lora_name), wait, call.key)
