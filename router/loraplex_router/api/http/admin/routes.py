"""Adapter administration over HTTP, as over gRPC: adapters are listed, loaded, unloaded and pinned."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from loraplex_protos.errors import FieldViolation, InvalidRequestError, quote
from loraplex_router.api.http.admin import schema
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.errors import LORAX_ERRORS, Error, Responses, only
from loraplex_router.api.http.json_body import JsonRoute
from loraplex_router.api.http.json_list import in_batches, write_list, write_parts
from loraplex_router.api.http.json_message import write_message
from loraplex_router.api.http.multipart import split_files
from loraplex_router.api.uploads import receive
from loraplex_router.replicas.listing import AT_A_TIME, AdapterPage
from loraplex_router.replicas.uploads import Announcement

ERRORS: Responses = {status: error for status, error in LORAX_ERRORS.items() if status not in (429, 499)}
ANSWERS: Responses = {200: {"model": schema.AdapterStatus}, **ERRORS}
IN_USE: Responses = {409: {"model": Error, "description": "Sequences still need the adapter."}}
NO_PINS: Responses = {409: {"model": Error, "description": "No more adapters can be pinned."}}

CONFLICT: Responses = {409: {"model": Error, "description": "The name is not as expected."}}
JSON = "application/json"
BINARY = {"type": "string", "format": "binary"}
FILES = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": {"type": "object", "additionalProperties": BINARY}}},
    }
}

Name = Annotated[str, Query(description="The name that requests will use.")]
Expected = Annotated[
    int | None, Query(ge=0, lt=2**63, description="The version that it must have now; 0: none. Absent: any.")
]
Limit = Annotated[
    int, Query(ge=1, description="The most adapters to list, but for those with the same id. Absent: all of them.")
]
After = Annotated[str, Query(description="List the adapters after this id: the last one of the page before.")]


def _check_query(request: Request) -> None:
    """Refuses misspelt names."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    wanted = f"use {', '.join(sorted(known))}" if known else "there is none here"
    unknown = [name for name in dict.fromkeys(request.query_params) if name not in known]
    if unknown:
        raise InvalidRequestError(
            *(FieldViolation(name[:100], f"is not a query parameter: {wanted}") for name in unknown)
        )


router = APIRouter(tags=["Adapters"], route_class=JsonRoute, dependencies=[Depends(_check_query)])


@router.get("", responses={200: {"model": list[schema.AdapterStatus]}, **only(ERRORS, 401, 422, 503)})
async def list_adapters(call: Call, limit: Limit = 0, after: After = "") -> Response:
    """The adapters that are loaded, and those in the adapter directory, sorted by id. In pages, if there is a limit: a
    page that has fewer is the last one."""
    if after and not await call.service.adapters.lists(after, call.key):
        raise InvalidRequestError(FieldViolation("after", f"must be a listed id, which {quote(after)} is not"))
    if limit:
        page = await call.service.adapters.list(call.key, after, limit)
        return StreamingResponse(write_list(map(write_message, page.adapters), AT_A_TIME), media_type=JSON)
    pages = call.service.adapters.pages(call.key, after)
    first = await anext(pages)  # what is refused is refused here

    async def parts() -> AsyncIterator[list[Any]]:
        page: AdapterPage | None = first
        while page is not None:
            async for part in in_batches(map(write_message, page.adapters), AT_A_TIME):
                yield part
            page = await anext(pages, None)

    return StreamingResponse(write_parts(parts()), media_type=JSON)


@router.post("/load", responses=ANSWERS)
async def load_adapter(body: schema.AdapterReference, call: Call) -> Response:
    """Fetches and checks an adapter now. One that was loaded before is read again."""
    return JSONResponse(write_message(await call.service.adapters.load(body.reference(), call.key)))


@router.post("/upload", responses={**ANSWERS, **CONFLICT}, openapi_extra=FILES)
async def upload_adapter(name: Name, request: Request, call: Call, expected_version: Expected = None) -> Response:
    """Makes an adapter's files, as multipart/form-data, the newest version of a name. They are kept beside the registry
    file if it can be written, or else only in memory."""
    size = request.headers.get("content-length", "")
    if not size.isdecimal() or len(size) > 18:
        raise InvalidRequestError(FieldViolation("content-length", "is needed: say how large the body is"))
    upload = Announcement(name, int(size), expected_version)

    async def read() -> dict[str, memoryview]:
        body = await receive(request.stream(), upload.size)
        return split_files(body, request.headers.get("content-type", ""))

    return JSONResponse(write_message(await call.service.adapters.upload(upload, read, call.key)))


@router.post("/register", responses={**ANSWERS, **CONFLICT})
async def register_adapter(body: schema.Register, call: Call) -> Response:
    """Makes an adapter the newest version of a name in the registry file, with its source, commit and content as they
    are now."""
    status = await call.service.adapters.register(body.name, body.reference(), body.expected_version, call.key)
    return JSONResponse(write_message(status))


@router.post("/alias", responses={**ANSWERS, **CONFLICT})
async def set_alias(body: schema.Alias, call: Call) -> Response:
    """Makes a name in the registry file stand for one other name or version, or for several with shares."""
    return JSONResponse(
        write_message(await call.service.adapters.set_alias(body.name, body.targets, body.expected, call.key))
    )


@router.post("/remove", response_class=Response, responses={**ERRORS, **CONFLICT})
async def remove_adapter(body: schema.Remove, call: Call) -> Response:
    """Removes an uploaded adapter's name, or from the registry file a name, an alias, or a version (name@version) other
    than the newest. Sequences that use it run to their end."""
    await call.service.adapters.remove(body.name, body.expected_version, call.key)
    return Response()


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
