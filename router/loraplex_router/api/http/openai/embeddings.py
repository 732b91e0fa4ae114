"""OpenAI's embeddings."""

import base64
import struct
from array import array
from math import hypot, isclose
from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from pydantic import AliasChoices, BaseModel, Field

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.api.http.answer_headers import answer_headers
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.disconnects import finish_before_disconnect
from loraplex_router.api.http.fields import CountOrAll, Name, Prompts, read_prompts
from loraplex_router.api.http.json_body import JsonRoute
from loraplex_router.api.http.json_list import write_data
from loraplex_router.api.http.model_names import answered_name, read_model_name
from loraplex_router.api.http.openai_errors import ERRORS
from loraplex_router.api.http.unknown_fields import OpenBody, unknown_fields
from loraplex_router.vocabulary.request import EmbedRequest
from loraplex_router.vocabulary.violations import Violations

FLOATS = 8192  # per part
NEARLY_1 = 1e-3

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)


class OpenaiRequest(OpenBody):
    model: Name = Field(default="", description="The base model (also: empty), an adapter, or base:adapter.")
    input: Prompts
    truncate_prompt_tokens: CountOrAll | None = Field(
        default=None, description="vLLM's: how many tokens of each input to keep, from its end; -1: as many as fit."
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(
        default=None, description="The length of the vectors, for models whose config.json says that they have others."
    )
    use_activation: bool | None = Field(
        default=None,
        validation_alias=AliasChoices("use_activation", "normalize"),
        description="vLLM's. Refused if false: the model's files say whether vectors are scaled to length 1.",
    )


class OpenaiEmbedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class OpenaiAnswer(BaseModel):
    object: Literal["list"]
    data: list[OpenaiEmbedding]
    model: str
    usage: dict[str, int]


@router.post("/embeddings", responses={200: {"model": OpenaiAnswer}, **ERRORS})
async def openai_embeddings(body: OpenaiRequest, call: Call) -> Response:
    """A vector for each input, pooled from the last hidden states as the files of sentence-transformers beside the
    model say; without such files, their mean over all tokens, scaled to length 1."""
    _check_dimensions(body.dimensions, call.service.info)
    if body.use_activation is False:
        reason = "is not supported: the model's files say whether vectors are scaled to length 1"
        raise InvalidRequestError(FieldViolation("use_activation", reason))
    names = call.service.model_names
    adapter = read_model_name(body.model, names)
    inputs, ignored = tuple(read_prompts(body.input)), unknown_fields(body)
    request = EmbedRequest(inputs, adapter, body.truncate_prompt_tokens, warnings=ignored, request_id=call.request_id)
    found = await finish_before_disconnect(call.service.pooling.embed(call.complete(request), call.key), call.receive)
    width = len(found[0].values)
    if body.dimensions is not None and body.dimensions > width:
        raise InvalidRequestError(FieldViolation("dimensions", f"must be at most {width}"))
    in_base64, tokens = body.encoding_format == "base64", sum(embedding.prompt_tokens for embedding in found)
    rows = (
        {
            "object": "embedding",
            "index": index,
            "embedding": _encode(each.values, body.dimensions, in_base64),
        }
        for index, each in enumerate(found)
    )
    batch = max(1, FLOATS // width)  # a thousand vectors are tens of megabytes
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    written = write_data(rows, batch, model=answered_name(body.model, names), usage=usage)
    return StreamingResponse(written, media_type="application/json", headers=answer_headers(found, call.request_id))


def _check_dimensions(wanted: int | None, info: pb.GetModelInfoResponse) -> None:
    """As vLLM does. Raises InvalidRequestError."""
    if wanted is None:
        return
    found, lengths = Violations(), list(info.matryoshka_dimensions)
    found.check(info.is_matryoshka, "dimensions", "is not supported by this model's config.json")
    found.check(not lengths or wanted in lengths, "dimensions", f"must be one of {', '.join(map(str, lengths))}")
    found.check(wanted >= 1, "dimensions", "must be at least 1")
    found.raise_any()


def _beginning(values: "array[float]", length: int) -> "array[float]":
    """The first values. Those of a vector of length 1 are scaled to it again."""
    first = values[:length]
    if not isclose(hypot(*values), 1, abs_tol=NEARLY_1):
        return first
    norm = hypot(*first) or 1.0
    return array("f", (value / norm for value in first))


def _encode(values: "array[float]", dimensions: int | None, in_base64: bool) -> list[float] | str:
    """In base64 as OpenAI's client reads it: float32, little endian."""
    values = values if dimensions is None else _beginning(values, dimensions)
    if not in_base64:
        return values.tolist()
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
