"""Anthropic's messages, and how many tokens their prompts have."""

from typing import Any

from fastapi import APIRouter, Response

from loraplex_router.api.http.answer_headers import answer_headers
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.disconnects import collect
from loraplex_router.api.http.json_body import JsonAnswer, JsonRoute
from loraplex_router.api.http.messages.answers import MessageAnswer, TokenCount
from loraplex_router.api.http.messages.errors import ERRORS, write_error
from loraplex_router.api.http.messages.reading import read_chat, read_request
from loraplex_router.api.http.messages.schema import ConversationBody, MessagesBody
from loraplex_router.api.http.messages.writing import PING, MessageWriter
from loraplex_router.api.http.model_names import answered_name, read_model_name
from loraplex_router.api.http.sse import EventStream, describe_events, named_event

EVENTS = describe_events("An event, whose name is its type. The last is message_stop, or error.")

router = APIRouter(tags=["Anthropic"], route_class=JsonRoute)


@router.post("", responses={200: {"model": MessageAnswer, "content": EVENTS}, **ERRORS})
async def messages(body: MessagesBody, call: Call) -> Response:
    """Answers a conversation, with the model's own chat template."""
    service = call.service
    request = read_request(body, service.model_names, service.sampling_defaults, call.request_id)
    stream = call.stream(body.stream)
    generation = await service.generate(call.complete(request), call.key, stream=stream)
    headers = {"request-id": generation.request_id, **answer_headers([generation], generation.request_id)}
    writer = MessageWriter(body, generation, answered_name(body.model, service.model_names))
    if body.stream:
        ping = named_event(PING)
        return EventStream(service, [generation], writer.events, write_error, headers, named_event, ping, stream=stream)
    ((delta,),) = await collect(service, [generation], call.receive)
    return JsonAnswer(writer.whole(delta), headers=headers)


@router.post("/count_tokens", responses={200: {"model": TokenCount}, **ERRORS})
async def count_tokens(body: ConversationBody, call: Call) -> dict[str, Any]:
    """How many tokens the prompt has, with the adapter's chat template if it has one."""
    adapter = read_model_name(body.model, call.service.model_names)
    spans = await call.service.tokenize(read_chat(body), False, adapter, call.key, call.session)
    return {"input_tokens": len(spans)}
