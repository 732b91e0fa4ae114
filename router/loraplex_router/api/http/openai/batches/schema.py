"""What is read, and what is answered. Files and batches themselves are in `batches/records.py`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from loraplex_router.batches.records import BatchRecord, ExpiresAfter, FileRecord

ENDPOINTS = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]

Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class CreateBatch(BaseModel):
    model_config = ConfigDict(extra="forbid")

    input_file_id: str
    endpoint: ENDPOINTS
    completion_window: Literal["24h"]
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


class FileForm(BaseModel):
    """What comes with an upload, by the names that a form has for it."""

    model_config = ConfigDict(extra="forbid")

    purpose: Literal["batch"]
    expires_after: ExpiresAfter | None = None


class Deleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class Page(BaseModel):
    object: Literal["list"] = "list"
    first_id: str | None
    last_id: str | None
    has_more: bool


class FilePage(Page):
    data: list[FileRecord]


class BatchPage(Page):
    data: list[BatchRecord]
