"""LoRAX's generation and embedding."""

from dataclasses import replace

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from loraplex_router.api.http.answer_headers import answer_headers
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.disconnects import collect, finish_before_disconnect
from loraplex_router.api.http.errors import LORAX_ERRORS, Responses, write_lorax_error
from loraplex_router.api.http.json_body import JsonAnswer, JsonRoute
from loraplex_router.api.http.lorax import schema
from loraplex_router.api.http.lorax.reading import adapter_token, read_adapter, read_request, wants_details
from loraplex_router.api.http.lorax.writing import LoraxWriter, static_headers, whole_headers
from loraplex_router.api.http.sse import EventStream, describe_events
from loraplex_router.api.http.unknown_fields import unknown_fields
from loraplex_router.api.turns import in_turn
from loraplex_router.vocabulary.request import EmbedRequest

EVENTS = describe_events("A StreamResponse. There may be comments between events.")
COMPAT: Responses = {200: {"model": list[schema.GenerateResponse], "content": EVENTS}, **LORAX_ERRORS}

router = APIRouter(tags=["LoRAX"], route_class=JsonRoute)


@router.post("/generate", responses={200: {"model": schema.GenerateResponse}, **LORAX_ERRORS})
async def generate(body: schema.GenerateRequest, call: Call) -> Response:
    """Answers once everything is generated."""
    return await _generate(body, call, stream=False)


@router.post("/generate_stream", response_class=Response, responses={200: {"content": EVENTS}, **LORAX_ERRORS})
async def generate_stream(body: schema.GenerateRequest, call: Call) -> Response:
    """One server-sent event per token."""
    return await _generate(body, call, stream=True)


@router.post("/", responses=COMPAT)
@router.post("/invocations", responses=COMPAT)
async def compat_generate(body: schema.CompatGenerateRequest, call: Call) -> Response:
    """A list with one answer, or server-sent events if `stream` is true. The Python clients call this."""
    return await _generate(body, call, bool(body.stream), as_list=True)


@router.post("/embed", responses={200: {"model": schema.EmbedResponse}, **LORAX_ERRORS})
async def lorax_embed(body: schema.EmbedRequest, call: Call) -> Response:
    """The input's vector, pooled from the last hidden states as the files of sentence-transformers beside the model
    say; without such files, their mean over all tokens, scaled to length 1."""
    given = body.parameters or schema.Parameters()
    adapter, ignored = read_adapter(given, adapter_token(call)), unknown_fields(body, given)
    request = EmbedRequest((body.inputs,), adapter, given.truncate, warnings=ignored, request_id=call.request_id)
    (found,) = await finish_before_disconnect(
        call.service.pooling.embed(call.complete(request), call.key), call.receive
    )
    return JSONResponse({"embeddings": found.values.tolist()}, headers=answer_headers([found], call.request_id))


async def _generate(body: schema.GenerateRequest, call: Call, stream: bool, as_list: bool = False) -> Response:
    request, given = read_request(body, adapter_token(call), stream), body.parameters or schema.Parameters()
    streamed = call.stream(stream)
    request = replace(call.complete(request), request_id=call.request_id)
    generation = await call.service.generate(request, call.key, stream=streamed)
    headers = static_headers(call.service.info.model_id, body.inputs, request.adapter)
    headers |= answer_headers([generation], generation.request_id)
    prefix = body.inputs if given.return_full_text else ""
    writer = LoraxWriter(generation, call.service.tokenizer_of(generation.adapter), wants_details(given), prefix)
    if stream:
        return EventStream(call.service, [generation], writer.events, write_lorax_error, headers, stream=streamed)
    (deltas,) = await collect(call.service, [generation], call.receive)
    headers |= whole_headers(generation)

    def write() -> Response:
        answer = writer.whole(deltas)
        return JsonAnswer([answer] if as_list else answer, headers=headers)

    return await in_turn(generation.num_logprobs, write)
