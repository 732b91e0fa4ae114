"""OpenAI's responses."""

from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from loraplex_router.api.http.answer_headers import answer_headers
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.disconnects import collect
from loraplex_router.api.http.json_body import JsonAnswer, JsonRoute
from loraplex_router.api.http.model_names import answered_name
from loraplex_router.api.http.openai.responses.reading import read_as_chat, read_request
from loraplex_router.api.http.openai.responses.schema import ResponsesBody
from loraplex_router.api.http.openai.responses.writing import ResponseWriter
from loraplex_router.api.http.openai_errors import ERRORS
from loraplex_router.api.http.sse import EventStream, describe_events, named_event
from loraplex_router.api.turns import in_turn

EVENTS = describe_events(
    "An event, whose name is its type. The last is response.completed, response.incomplete or response.failed."
)

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)


class ResponseAnswer(BaseModel):
    """For the OpenAPI document; OpenAI's own says more."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]


@router.post("", responses={200: {"model": ResponseAnswer, "content": EVENTS}, **ERRORS})
async def responses(body: ResponsesBody, call: Call) -> Response:
    """Answers a conversation, with the model's own chat template."""
    service = call.service
    chat = read_as_chat(body)
    request = read_request(body, chat, service.model_names, service.sampling_defaults, call.request_id)
    stream = call.stream(body.stream)
    generation = await service.generate(replace(request, session=call.session), call.key, stream=stream)
    model, tokenizer = answered_name(body.model, service.model_names), service.tokenizer_of(generation.adapter)
    writer = ResponseWriter(body, chat, generation, model, tokenizer)
    headers = {"X-Request-Id": generation.request_id, **answer_headers([generation])}
    if body.stream:
        return EventStream(service, [generation], writer.events, writer.failed, headers, named_event, stream=stream)
    ((delta,),) = await collect(service, [generation], call.receive)
    return await in_turn(generation.num_logprobs, lambda: JsonAnswer(writer.whole(delta), headers=headers))
