"""OpenAI's generation."""

from collections.abc import Sequence

from fastapi import APIRouter, Response

from loraplex_router.api.http.answer_headers import answer_headers
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.disconnects import collect
from loraplex_router.api.http.json_body import JsonAnswer, JsonRoute
from loraplex_router.api.http.model_names import answered_name
from loraplex_router.api.http.openai import answers
from loraplex_router.api.http.openai.chat import ChatWriter, read_chat
from loraplex_router.api.http.openai.completions import CompletionWriter, read_completions
from loraplex_router.api.http.openai.reading import named_by
from loraplex_router.api.http.openai.schema import ChatCompletionRequest, CompletionRequest
from loraplex_router.api.http.openai.tools import with_tools
from loraplex_router.api.http.openai_errors import ERRORS, write_error
from loraplex_router.api.http.sse import EventStream, describe_events
from loraplex_router.api.turns import in_turn
from loraplex_router.engine.generation import Generation
from loraplex_router.journal.stream import Stream

EVENTS = describe_events("A chunk. The last event is [DONE]. There may be comments between events.")

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)


@router.post("/completions", responses={200: {"model": answers.Completion, "content": EVENTS}, **ERRORS})
async def completions(body: CompletionRequest, call: Call) -> Response:
    """Continues one prompt or several."""
    service, stream = call.service, call.stream(body.stream)
    requests = read_completions(body, service.model_names, service.sampling_defaults, call.request_id)
    body = body.model_copy(update={"model": answered_name(body.model, service.model_names)})
    requests = [call.complete(each) for each in requests]
    with named_by(body, service.model_names):
        generations = await service.generate_all(requests, call.key, stream)
    writer = CompletionWriter(body, generations, service.tokenizer_of, service.info.version)
    return await _answer(call, generations, writer, stream)


@router.post("/chat/completions", responses={200: {"model": answers.ChatCompletion, "content": EVENTS}, **ERRORS})
async def chat_completions(body: ChatCompletionRequest, call: Call) -> Response:
    """Answers a conversation, with the model's own chat template."""
    service, body = call.service, with_tools(body)
    request = read_chat(body, service.model_names, service.sampling_defaults, call.request_id)
    stream = call.stream(body.stream)
    with named_by(body, service.model_names):
        generations = await service.generate_each(call.complete(request), call.key, stream=stream)
    body = body.model_copy(update={"model": answered_name(body.model, service.model_names)})
    writer = ChatWriter(body, generations, service.tokenizer_of, service.info.version)
    return await _answer(call, generations, writer, stream)


async def _answer(
    call: Call, generations: Sequence[Generation], writer: CompletionWriter | ChatWriter, stream: Stream | None
) -> Response:
    headers = answer_headers(generations, generations[0].request_id)
    if writer.body.stream:
        return EventStream(call.service, generations, writer.events, write_error, headers, stream=stream)
    deltas = await collect(call.service, generations, call.receive)
    size = sum(generation.num_logprobs for generation in generations)
    return await in_turn(size, lambda: JsonAnswer(writer.whole(deltas), headers=headers))
