"""The models that clients can name: the base model and adapters, which vLLM's routes load and unload."""

import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.adapter_names import normal
from loraplex_protos.errors import AdapterNotFoundError, quote
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.errors import Responses, only
from loraplex_router.api.http.json_body import JsonRoute
from loraplex_router.api.http.json_list import in_batches, write_data, write_parts
from loraplex_router.api.http.json_message import enum_names
from loraplex_router.api.http.named_loads import NamedLoad, NamedUnload, load_named, unload_named
from loraplex_router.api.http.openai import answers
from loraplex_router.api.http.openai.pages import cut_page
from loraplex_router.api.http.openai_errors import ERRORS, OpenaiError
from loraplex_router.replicas.listing import AT_A_TIME, AdapterPage
from loraplex_router.service.service import Service
from loraplex_router.vocabulary.adapter import OTHER_BASE_NAMES

TIERS = enum_names(pb.AdapterTier.DESCRIPTOR)

STARTED = int(time.time())  # when models count as created

Limit = Annotated[int | None, Query(ge=1, description="The most models to list. Absent: all of them.")]
After = Annotated[str, Query(description="List the models after this one: the `last_id` of the page before.")]

ANSWERS: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **ERRORS}
CONFLICT: Responses = {409: {"model": OpenaiError, "description": "The name is not new: set load_inplace."}}
IN_USE: Responses = {409: {"model": OpenaiError, "description": "Sequences still need the adapter."}}

router = APIRouter(route_class=JsonRoute)


@router.get("/models", tags=["OpenAI"], responses={200: {"model": answers.ModelList}, **only(ERRORS, 400, 401, 503)})
async def models(call: Call, limit: Limit = None, after: After = "") -> Response:
    """The base model, and every adapter that is loaded or in the adapter directory, unless it is broken."""
    if limit is None and not after:
        return await _write_all(call)
    found = await _list_models(call, limit, after)
    ids = list(found)
    part, ends = cut_page(ids, limit, after, "a listed model")
    written = write_data((_describe(call.service, id, found[id]) for id in ids[part]), AT_A_TIME, **ends)
    return StreamingResponse(written, media_type="application/json")


@router.get(
    "/models/{model:path}", tags=["OpenAI"], responses={200: {"model": answers.Model}, **only(ERRORS, 401, 404, 503)}
)
async def model(model: str, call: Call) -> Response:
    """One of the models that are listed."""
    name = normal(model)
    found = await _list_models(call, only=name)
    if name in found:
        return JSONResponse(_describe(call.service, name, found[name]))
    raise AdapterNotFoundError(f"the model {quote(model)} does not exist")


@router.post("/load_lora_adapter", tags=["Adapters"], response_class=Response, responses={**ANSWERS, **CONFLICT})
async def vllm_load(body: NamedLoad, call: Call) -> Response:
    """Loads an adapter, as vLLM does. It is served under its own name, or with --adapter-registry under any: then it is
    registered as a version of that name."""
    status = await load_named(body, call)
    done = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    return PlainTextResponse("\n".join((done, *(f"Warning: {warning}" for warning in status.warnings))))


@router.post("/unload_lora_adapter", tags=["Adapters"], response_class=Response, responses={**ANSWERS, **IN_USE})
async def vllm_unload(body: NamedUnload, call: Call) -> Response:
    """Unloads an adapter, as vLLM does. A name in the registry, or of an upload, is removed."""
    await unload_named(body, call)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _write_all(call: Call) -> Response:
    names = call.service.model_names
    pages, last, seen = call.service.adapters.pages(call.key), names[-1], set(names)
    first = await anext(pages)  # what is refused is refused here

    def rows(statuses: Iterable[pb.AdapterStatus]) -> Iterator[dict[str, Any]]:
        nonlocal last
        for name, status in _named(statuses, names):
            if name not in seen:
                seen.add(name)
                last = name
                yield _describe(call.service, name, status)

    async def parts() -> AsyncIterator[list[Any]]:
        yield [_describe(call.service, name, None) for name in names]
        page: AdapterPage | None = first
        while page is not None:
            async for part in in_batches(rows(page.adapters), AT_A_TIME):
                yield part
            page = await anext(pages, None)

    async def written() -> AsyncIterator[bytes]:
        yield b'{"object":"list","data":'
        async for part in write_parts(parts()):
            yield part
        yield b"," + orjson.dumps({"first_id": names[0], "last_id": last, "has_more": False})[1:]

    return StreamingResponse(written(), media_type="application/json")


def _named(statuses: Iterable[pb.AdapterStatus], base: Sequence[str]) -> Iterator[tuple[str, pb.AdapterStatus]]:
    """Those that can be requested, with the names that do so: one that the base model has, too, needs a prefix."""
    ambiguous = {*base, *OTHER_BASE_NAMES}
    for status in statuses:
        if status.state != pb.ADAPTER_STATE_BROKEN:
            yield f"{base[0]}:{status.id}" if status.id in ambiguous else status.id, status


async def _list_models(
    call: Call, limit: int | None = None, after: str = "", only: str = ""
) -> dict[str, pb.AdapterStatus | None]:
    """Statuses by id, in the order of the listing. The base model, which has no status, comes first, under all its
    names. With a limit: at least one more than that after the model `after`, if there are so many, and that one,
    without its status. `only`: the base model's names, and adapters with this one."""
    names, adapters = call.service.model_names, call.service.adapters
    found: dict[str, pb.AdapterStatus | None] = dict.fromkeys(names)
    prefix = f"{names[0]}:"
    last = "" if after in found else after.removeprefix(prefix)
    if last and await adapters.lists(last, call.key):
        found[after] = None
    most, more = 0 if limit is None else len(found) + limit + 1, True
    while more and (not most or len(found) < most):
        page, more = await adapters.list(call.key, last, most, only.removeprefix(prefix))
        for name, status in _named(page, names):
            found.setdefault(name, status)
        last = page[-1].id if page else ""
    return found


def _describe(service: Service, name: str, status: pb.AdapterStatus | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "loraplex",
        "root": status.id if status else service.info.model_id,
        "parent": service.model_names[0] if status else None,
        "max_model_len": service.info.max_model_len,
        "tier": TIERS[status.tier] if status and status.tier else None,
        "invocation": status.invocation or None if status else None,
    }
