"""OpenAI's files and batches. What a batch runs is in `loraplex_router/batches`."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from loraplex_protos.errors import (
    BatchNotFoundError,
    DeadlineError,
    FieldViolation,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from loraplex_router.api.http.call import Call, RouteCall
from loraplex_router.api.http.errors import only
from loraplex_router.api.http.json_body import JsonRoute
from loraplex_router.api.http.openai.batches.schema import BatchPage, CreateBatch, Deleted, FileForm, FilePage
from loraplex_router.api.http.openai.pages import cut_page
from loraplex_router.api.http.openai_errors import ERRORS
from loraplex_router.batches.batches import Batches
from loraplex_router.batches.records import FILE_SECONDS, BatchRecord, FileRecord

MOST_BYTES = 200 << 20  # of a file, as at OpenAI
MOST_UPLOADS = 4  # of a tenant at the same time
SECONDS = 600.0  # for all of an upload, or a piece of a download
ANSWER_SECONDS = 15.0  # for anything else

UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"enum": ["batch"]},
                        "expires_after[anchor]": {"enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": FILE_SECONDS},
                    },
                    "dependentRequired": {
                        "expires_after[anchor]": ["expires_after[seconds]"],
                        "expires_after[seconds]": ["expires_after[anchor]"],
                    },
                }
            }
        },
    }
}

T = TypeVar("T", FileRecord, BatchRecord)
R = TypeVar("R")

Limit = Annotated[int, Query(ge=1, le=10_000)]
After = Annotated[str, Query(description="The `last_id` of the page before.")]
Order = Literal["asc", "desc"]

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)
uploads: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(MOST_UPLOADS))  # by tenant


@router.post("/files", response_model=FileRecord, openapi_extra=UPLOAD, responses=only(ERRORS, 400, 401, 404, 429))
async def upload_file(request: Request, call: Call) -> FileRecord:
    """Keeps a file of requests, one per line, for a batch."""
    batches, tenant = _batches(call)
    if uploads[tenant].locked():
        raise OverloadedError(f"{MOST_UPLOADS} files are being uploaded: try again later")
    async with uploads[tenant]:
        form = await _read_form(request)
        try:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise InvalidRequestError(FieldViolation("file", "send a file of JSON lines"))
            fields = _read_fields({name: value for name, value in form.items() if name != "file"})
            name = (file.filename or "batch.jsonl")[:255]
            arguments = tenant, name, fields.purpose, file.file, fields.expires_after
            return await batches.ask(tenant, SECONDS, batches.add_file, *arguments)
        finally:
            await form.close()


@router.get("/files", response_model=FilePage, responses=only(ERRORS, 400, 401, 404, 429))
async def list_files(
    call: Call, purpose: str = "", limit: Limit = 10_000, after: After = "", order: Order = "desc"
) -> FilePage:
    """The files of this key's tenant."""
    found = await _ask(call, lambda batches, tenant: batches.files(tenant))
    found = [each for each in found if purpose in ("", each.purpose)]
    return FilePage(**_page(found, limit, after, order))


@router.get("/files/{file_id}", response_model=FileRecord, responses=only(ERRORS, 401, 404, 429))
async def retrieve_file(file_id: str, call: Call) -> FileRecord:
    """One file."""
    return await _ask(call, lambda batches, tenant: batches.file(tenant, file_id))


@router.get("/files/{file_id}/content", response_class=FileResponse, responses=only(ERRORS, 401, 404, 429))
async def file_content(file_id: str, call: Call) -> Response:
    """A file's content: the requests of an input, the answers of an output."""
    batches, tenant = _batches(call)
    file = await _ask(call, lambda batches, tenant: batches.file(tenant, file_id))
    content = batches.content(tenant, file_id)
    if isinstance(content, Path):
        return FileResponse(content, media_type="application/octet-stream", filename=file.filename)
    first = await batches.ask(tenant, ANSWER_SECONDS, next, content, b"")
    headers = {
        "content-length": str(file.bytes),
        "content-disposition": f"attachment; filename*=utf-8''{quote(file.filename, safe='')}",
    }
    pieces = _stream(batches, tenant, first, content)
    return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)


@router.delete("/files/{file_id}", response_model=Deleted, responses=only(ERRORS, 400, 401, 404, 429))
async def delete_file(file_id: str, call: Call) -> Deleted:
    """Deletes a file, unless a batch that has not ended needs it."""
    await _ask(call, lambda batches, tenant: batches.delete_file(tenant, file_id))
    return Deleted(id=file_id)


@router.post("/batches", response_model=BatchRecord, responses=only(ERRORS, 400, 401, 404, 429))
async def create_batch(body: CreateBatch, call: Call) -> BatchRecord:
    """Answers a file's requests in the background, within a day."""
    return await _ask(
        call,
        lambda batches, tenant: batches.add_batch(
            tenant,
            body.input_file_id,
            body.endpoint,
            body.completion_window,
            body.metadata,
            body.output_expires_after,
        ),
    )


@router.get("/batches", response_model=BatchPage, responses=only(ERRORS, 400, 401, 404, 429))
async def list_batches(call: Call, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: After = "") -> BatchPage:
    """The batches of this key's tenant, newest first."""
    found = [_shown(batch) for batch in await _ask(call, lambda batches, tenant: batches.batches(tenant))]
    return BatchPage(**_page(found, limit, after, "desc"))


@router.get("/batches/{batch_id}", response_model=BatchRecord, responses=only(ERRORS, 401, 404, 429))
async def retrieve_batch(batch_id: str, call: Call) -> BatchRecord:
    """How far a batch is."""
    return _shown(await _ask(call, lambda batches, tenant: batches.batch(tenant, batch_id)))


@router.post("/batches/{batch_id}/cancel", response_model=BatchRecord, responses=only(ERRORS, 401, 404, 429))
async def cancel_batch(batch_id: str, call: Call) -> BatchRecord:
    """Stops a batch within seconds. What it has answered so far can be read."""
    return _shown(await _ask(call, lambda batches, tenant: batches.cancel(tenant, batch_id)))


def _shown(batch: BatchRecord) -> BatchRecord:
    """Without the ids of files that cannot be read yet: clients wait for one to read its file."""
    return batch if batch.status.final else batch.model_copy(update={"output_file_id": None, "error_file_id": None})


def _batches(call: RouteCall) -> tuple[Batches, str]:
    """All of them, and the name of the caller's tenant. Raises UnauthenticatedError, and BatchNotFoundError if there
    are none here."""
    tenant = call.service.keys.tenant(call.key)
    if call.service.batches is None:
        raise BatchNotFoundError("this server keeps no files and batches: start it with --batches FOLDER, or a bucket")
    return call.service.batches, tenant.name


async def _ask(call: RouteCall, question: Callable[[Batches, str], R]) -> R:
    batches, tenant = _batches(call)
    return await batches.ask(tenant, ANSWER_SECONDS, question, batches, tenant)


async def _stream(batches: Batches, tenant: str, first: bytes, rest: Iterator[bytes]) -> AsyncIterator[bytes]:
    piece = first
    while piece:
        yield piece
        piece = await batches.ask(tenant, SECONDS, next, rest, b"")


async def _read_form(request: Request) -> Any:
    """A file beyond a megabyte is on disk from then on. Raises InvalidRequestError if it is too large or cannot be
    read, DeadlineError if it takes too long, UnavailableError if the disk is full."""
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > MOST_BYTES:
            raise InvalidRequestError(FieldViolation("file", f"has more than {MOST_BYTES >> 20} MiB"))
        return message

    try:
        async with asyncio.timeout(SECONDS):
            return await Request(request.scope, receive).form(max_files=1, max_fields=8)
    except TimeoutError:  # an OSError, too
        raise DeadlineError(f"the upload was not complete after {SECONDS:g} seconds") from None
    except OSError as error:
        why = f"the file cannot be kept while it arrives: {error.strerror}: try again later"
        raise UnavailableError(why) from error
    except HTTPException as error:
        raise InvalidRequestError(FieldViolation("body", f"is not multipart/form-data: {error.detail}")) from error


def _read_fields(form: dict[str, Any]) -> FileForm:
    """Raises RequestValidationError."""
    fields: dict[str, Any] = {}
    for name, value in form.items():
        outer, bracket, inner = name.removesuffix("]").partition("[")
        if bracket and isinstance(fields.setdefault(outer, {}), dict):
            fields[outer][inner] = value
        else:
            fields[name] = value
    try:
        return FileForm.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _page(found: Sequence[T], limit: int, after: str, order: Order) -> dict[str, Any]:
    rows = list(found) if order == "desc" else list(reversed(found))
    part, ends = cut_page([row.id for row in rows], limit, after, "the id of one")
    return {"data": rows[part], **ends}
