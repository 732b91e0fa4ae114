"""Adapter administration over HTTP, as over gRPC: adapters are listed, loaded, unloaded and pinned."""

from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse

from loraplex_router.api.http.admin import schema
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.errors import LORAX_ERRORS, Error, Responses, only
from loraplex_router.api.http.json_body import JsonRoute
from loraplex_router.api.http.json_list import write_list
from loraplex_router.api.http.json_message import write_message

ERRORS: Responses = {status: error for status, error in LORAX_ERRORS.items() if status not in (429, 499)}
ANSWERS: Responses = {200: {"model": schema.AdapterStatus}, **ERRORS}
IN_USE: Responses = {409: {"model": Error, "description": "Sequences still need the adapter."}}
NO_PINS: Responses = {409: {"model": Error, "description": "No more adapters can be pinned."}}

Limit = Annotated[
    int, Query(ge=1, description="The most adapters to list, but for those with the same id. Absent: all of them.")
]
After = Annotated[str, Query(description="List the adapters after this id: the last one of the page before.")]

router = APIRouter(tags=["Adapters"], route_class=JsonRoute)


@router.get("", responses={200: {"model": list[schema.AdapterStatus]}, **only(ERRORS, 401, 422, 503)})
async def list_adapters(call: Call, limit: Limit = 0, after: After = "") -> Response:
    """The adapters that are loaded, and those in the adapter directory, sorted by id. In pages, if there is a limit: a
    page that has fewer is the last one."""
    page = await call.service.adapters.list(call.key, after, limit)
    return StreamingResponse(write_list(map(write_message, page.adapters)), media_type="application/json")


@router.post("/load", responses=ANSWERS)
async def load_adapter(body: schema.AdapterReference, call: Call) -> Response:
    """Fetches and checks an adapter now. One that was loaded before is read again."""
    return JSONResponse(write_message(await call.service.adapters.load(body.reference(), call.key)))


@router.post("/unload", response_class=Response, responses={**ERRORS, **IN_USE})
async def unload_adapter(body: schema.Unload, call: Call) -> Response:
    """Frees what an adapter holds on the device and in host memory. While sequences need it, this is refused, or waits
    for them if `wait` is true."""
    await call.service.adapters.unload(body.name(), body.wait, call.key)
    return Response()


@router.post("/pin", responses={**ANSWERS, **NO_PINS})
async def pin_adapter(body: schema.AdapterName, call: Call) -> Response:
    """Brings an adapter to the device and keeps it there. Answers once it is there."""
    return JSONResponse(write_message(await call.service.adapters.pin(body.name(), call.key)))


@router.post("/unpin", responses=ANSWERS)
async def unpin_adapter(body: schema.AdapterName, call: Call) -> Response:
    """Lets the adapter leave the device when others need its place."""
    return JSONResponse(write_message(await call.service.adapters.unpin(body.name(), call.key)))
