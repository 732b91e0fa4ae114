"""OpenAI's routes."""

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from loraplex_protos.errors import AdapterNotFoundError, quote
from loraplex_router.adapters.administration import AdapterStatus
from loraplex_router.api.http.attendance import collect
from loraplex_router.api.http.errors import openai_body
from loraplex_router.api.http.json_body import JsonRoute
from loraplex_router.api.http.openai import answers
from loraplex_router.api.http.openai.chat import ChatWriter, read_chat
from loraplex_router.api.http.openai.completions import CompletionWriter, read_completions
from loraplex_router.api.http.openai.schema import ChatCompletionRequest, CompletionRequest
from loraplex_router.api.http.sse import EventStream, describe_events
from loraplex_router.keys import read_bearer
from loraplex_router.output import Generation
from loraplex_router.service import Service

DESCRIPTIONS = {
    400: "A field is wrong; `param` names it.",
    401: "No API key, or an unknown one.",
    403: "The API key, or the adapter's source, does not allow the adapter.",
    404: "No such model.",
    413: "The body is too large.",
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


def create_openai_routes(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)
    started = int(time.time())

    @routes.post("/completions", responses={200: {"model": answers.Completion, "content": EVENTS}, **ERRORS})
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Continues one prompt or several."""
        generations: list[Generation] = []
        body.model = body.model or service.info.model_id
        try:
            for request in read_completions(body, service.info.model_id):
                generations.append(await service.generate(request, api_key(http)))
                await asyncio.sleep(0)  # others have their turn between two prompts
        except BaseException:
            for generation in generations:
                service.leave(generation)
            raise
        writer = CompletionWriter(body, generations, service.tokenizer, service.info.version)
        if body.stream:
            return EventStream(service, generations, writer.events(), openai_body)
        return JSONResponse(writer.whole(await collect(service, generations, http.receive)))

    @routes.post("/chat/completions", responses={200: {"model": answers.ChatCompletion, "content": EVENTS}, **ERRORS})
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        """Answers a conversation, with the model's own chat template."""
        body.model = body.model or service.info.model_id
        generation = await service.generate(read_chat(body, service.info.model_id), api_key(http))
        writer = ChatWriter(body, generation, service.tokenizer, service.info.version)
        if body.stream:
            return EventStream(service, [generation], writer.events(), openai_body)
        (deltas,) = await collect(service, [generation], http.receive)
        return JSONResponse(writer.whole(deltas))

    @routes.get("/models", responses={200: {"model": answers.ModelList}, 401: ERRORS[401], 503: ERRORS[503]})
    async def models(http: Request) -> Response:
        """The base model, and every adapter that is loaded or lies in the adapter directory."""
        return JSONResponse({"object": "list", "data": await list_models(http)})

    not_listed: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 404, 503)}

    @routes.get("/models/{model:path}", responses={200: {"model": answers.Model}, **not_listed})
    async def model(model: str, http: Request) -> Response:
        """One of them."""
        for found in await list_models(http):
            if found["id"] == model:
                return JSONResponse(found)
        raise AdapterNotFoundError(f"the model {quote(model)} does not exist")

    async def list_models(http: Request) -> list[dict[str, Any]]:
        found = {service.info.model_id: describe(service.info.model_id, None, None)}
        for status in await service.list_adapters(api_key(http)):
            if status.id not in found:
                found[status.id] = describe(status.id, service.info.model_id, status)
        return list(found.values())

    def api_key(http: Request) -> str | None:
        return read_bearer(http.headers.get("authorization"))

    def describe(name: str, parent: str | None, status: AdapterStatus | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "loraplex",
            "root": name,
            "parent": parent,
            "max_model_len": service.info.max_model_len,
            "tier": status.tier.name.lower() if status and status.tier else None,
        }

    return routes
