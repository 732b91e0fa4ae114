"""OpenAI's routes."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from loraplex_protos.adapter_names import normal
from loraplex_protos.errors import AdapterNotFoundError, FieldViolation, InvalidRequestError, quote
from loraplex_router.api.http.api_key import api_key
from loraplex_router.api.http.disconnects import collect
from loraplex_router.api.http.errors import openai_body
from loraplex_router.api.http.json_body import JsonAnswer, JsonRoute
from loraplex_router.api.http.json_list import write_list
from loraplex_router.api.http.openai import answers
from loraplex_router.api.http.openai.chat import ChatWriter, read_chat
from loraplex_router.api.http.openai.completions import CompletionWriter, read_completions
from loraplex_router.api.http.openai.reading import answered_name
from loraplex_router.api.http.openai.schema import ChatCompletionRequest, CompletionRequest
from loraplex_router.api.http.sse import EventStream, describe_events
from loraplex_router.api.turns import in_turn
from loraplex_router.engine.output import Generation
from loraplex_router.replicas.statuses import AdapterStatus, State
from loraplex_router.service.service import Service
from loraplex_router.vocabulary.volume import Volume

DESCRIPTIONS = {
    400: "A field is wrong; `param` names it.",
    401: "No API key, or an unknown one.",
    403: "The API key, or the adapter's source, does not allow the adapter.",
    404: "No such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is compressed.",
    424: "The adapter's files cannot be served.",
    429: "The queue is full, or a limit of the API key is reached.",
    499: "The request was cancelled.",
    500: "The generation failed.",
    502: "The adapter's source does not answer.",
    503: "Starting, shutting down, or a shard is lost.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": answers.Error, "description": text} for status, text in DESCRIPTIONS.items()
}
EVENTS = describe_events("A chunk; at the end [DONE]. There may be comments between events.")

Limit = Annotated[int | None, Query(ge=1, description="The most models to list. Absent: all of them.")]
After = Annotated[str, Query(description="Those behind this one, the `last_id` of the page before.")]


def create_openai_routes(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)
    started = int(time.time())

    @routes.post("/completions", responses={200: {"model": answers.Completion, "content": EVENTS}, **ERRORS})
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Continues one prompt or several."""
        generations, volume = list[Generation](), Volume()
        requests = read_completions(body, service.model_names, service.sampling_defaults)
        body.model = answered_name(body.model, service.model_names)
        try:
            for request in requests:
                generations.append(await service.generate(request, api_key(http), volume))
        except BaseException:
            for generation in generations:
                service.close(generation)
            raise
        writer = CompletionWriter(body, generations, service.tokenizer, service.info.version)
        if body.stream:
            return EventStream(service, generations, writer.events(), openai_body)
        deltas = await collect(service, generations, http.receive)
        size = sum(generation.num_logprobs for generation in generations)
        return await in_turn(size, lambda: JsonAnswer(writer.whole(deltas)))

    @routes.post("/chat/completions", responses={200: {"model": answers.ChatCompletion, "content": EVENTS}, **ERRORS})
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        """Answers a conversation, with the model's own chat template."""
        generation = await service.generate(
            read_chat(body, service.model_names, service.sampling_defaults), api_key(http)
        )
        body.model = answered_name(body.model, service.model_names)
        writer = ChatWriter(body, generation, service.tokenizer, service.info.version)
        if body.stream:
            return EventStream(service, [generation], writer.events(), openai_body)
        (deltas,) = await collect(service, [generation], http.receive)
        return await in_turn(generation.num_logprobs, lambda: JsonAnswer(writer.whole(deltas)))

    not_paged: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (400, 401, 503)}

    @routes.get("/models", responses={200: {"model": answers.ModelList}, **not_paged})
    async def models(http: Request, limit: Limit = None, after: After = "") -> Response:
        """The base model, and every adapter that is loaded or lies in the adapter directory, unless it is broken."""
        found = await list_models(http)
        if after and after not in found:
            raise InvalidRequestError(FieldViolation("after", f"there is no model {quote(after)}"))
        rest = list(found)[list(found).index(after) + 1 if after else 0 :]
        page = rest[:limit]
        listed = write_list(describe(id, found[id]) for id in page)
        return StreamingResponse(_write_page(listed, page, len(page) < len(rest)), media_type="application/json")

    not_listed: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 404, 503)}

    @routes.get("/models/{model:path}", responses={200: {"model": answers.Model}, **not_listed})
    async def model(model: str, http: Request) -> Response:
        """One of them."""
        found, name = await list_models(http), normal(model)
        if name in found:
            return JSONResponse(describe(name, found[name]))
        raise AdapterNotFoundError(f"the model {quote(model)} does not exist")

    async def list_models(http: Request) -> dict[str, AdapterStatus | None]:
        """By id, in the order of the listing. The base model, which has no status, comes first, under all its names; an
        adapter that has one of them is listed as it can be asked for, behind the model's."""
        names = service.model_names
        found: dict[str, AdapterStatus | None] = dict.fromkeys(names)
        for status in await service.list_adapters(api_key(http)):
            if status.state is not State.BROKEN:
                found.setdefault(f"{names[0]}:{status.id}" if status.id in names else status.id, status)
        return found

    def describe(name: str, status: AdapterStatus | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "loraplex",
            "root": status.id if status else service.info.model_id,
            "parent": service.model_names[0] if status else None,
            "max_model_len": service.info.max_model_len,
            "tier": status.tier.name.lower() if status and status.tier else None,
        }

    return routes


async def _write_page(listed: AsyncIterator[bytes], ids: Sequence[str], more: bool) -> AsyncIterator[bytes]:
    yield b'{"object":"list","data":'
    async for part in listed:
        yield part
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    yield b"," + orjson.dumps({"first_id": first, "last_id": last, "has_more": more})[1:]
