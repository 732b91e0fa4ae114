"""OpenAI's responses."""

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.api.http.answer_headers import answer_headers
from loraplex_router.api.http.call import Call, RouteCall
from loraplex_router.api.http.disconnects import collect
from loraplex_router.api.http.errors import only
from loraplex_router.api.http.json_body import JsonAnswer, JsonRoute
from loraplex_router.api.http.model_names import answered_name
from loraplex_router.api.http.openai.pages import cut_page
from loraplex_router.api.http.openai.responses.reading import count_parts, read_as_chat, read_request
from loraplex_router.api.http.openai.responses.schema import ResponsesBody
from loraplex_router.api.http.openai.responses.stored import StoredResponses
from loraplex_router.api.http.openai.responses.writing import ResponseWriter
from loraplex_router.api.http.openai_errors import ERRORS
from loraplex_router.api.http.sse import EventStream, describe_events, named_event
from loraplex_router.api.turns import in_turn

EVENTS = describe_events(
    "An event, whose name is its type. The last is response.completed, response.incomplete or response.failed."
)

Limit = Annotated[int, Query(ge=1, le=100, description="The most items.")]

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


class Deleted(BaseModel):
    id: str
    object: Literal["response"]
    deleted: bool


class InputItems(BaseModel):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.post("", responses={200: {"model": ResponseAnswer, "content": EVENTS}, **ERRORS})
async def responses(body: ResponsesBody, call: Call) -> Response:
    """Answers a conversation, with the model's own chat template."""
    service, stored = call.service, _stored(call)
    body = stored.with_items(body)
    kept = stored.continued(body.previous_response_id)
    chat = await in_turn(count_parts(body, kept), lambda: read_as_chat(body, kept))
    keeps = service.responses.keeps
    request = read_request(body, chat, service.model_names, service.sampling_defaults, call.request_id, keeps)
    stream = call.stream(body.stream)
    generation = await service.generate(call.complete(request), call.key, stream=stream)
    model, tokenizer = answered_name(body.model, service.model_names), service.tokenizer_of(generation.adapter)
    keep = partial(stored.keep, body) if keeps and body.store is not False else None
    writer = ResponseWriter(body, chat, generation, model, tokenizer, keep)
    headers = answer_headers([generation], generation.request_id)
    if body.stream:
        return EventStream(service, [generation], writer.events, writer.failed, headers, named_event, stream=stream)
    ((delta,),) = await collect(service, [generation], call.receive)
    return await in_turn(generation.num_logprobs, lambda: JsonAnswer(writer.whole(delta), headers=headers))


@router.get("/{id}", responses={200: {"model": ResponseAnswer}, **only(ERRORS, 400, 401, 404)})
async def stored_response(id: str, call: Call, stream: bool = False) -> Response:
    """A response that was kept."""
    if stream:
        raise InvalidRequestError(FieldViolation("stream", "is not supported: a kept response is whole"))
    return JsonAnswer(_stored(call).response(id))


@router.delete("/{id}", responses={200: {"model": Deleted}, **only(ERRORS, 401, 404)})
async def delete_response(id: str, call: Call) -> dict[str, Any]:
    """Forgets a response that was kept. Those that continue it cannot be continued any more."""
    _stored(call).delete(id)
    return {"id": id, "object": "response", "deleted": True}


@router.get("/{id}/input_items", responses={200: {"model": InputItems}, **only(ERRORS, 400, 401, 404)})
async def input_items(
    id: str, call: Call, limit: Limit = 20, order: Literal["asc", "desc"] = "desc", after: str = ""
) -> Response:
    """What a kept response answered, with the conversation before it."""
    items = _stored(call).input_items(id)
    if order == "desc":
        items.reverse()
    part, ends = cut_page([item["id"] for item in items], limit, after, "an item's id")
    return JsonAnswer({"object": "list", "data": items[part], **ends})


def _stored(call: RouteCall) -> StoredResponses:
    """The caller's. Raises UnauthenticatedError."""
    return StoredResponses(call.service.responses, call.service.keys.tenant(call.key).name)
