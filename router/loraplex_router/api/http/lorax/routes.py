"""LoRAX's routes."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from loraplex_router.api.http.api_key import api_key
from loraplex_router.api.http.disconnects import collect
from loraplex_router.api.http.errors import lorax_body
from loraplex_router.api.http.json_body import JsonAnswer, JsonRoute
from loraplex_router.api.http.lorax import schema
from loraplex_router.api.http.lorax.front_page import FRONT_PAGE_HEADERS, front_page
from loraplex_router.api.http.lorax.reading import read_request, wants_details
from loraplex_router.api.http.lorax.writing import LoraxWriter, static_headers, whole_headers
from loraplex_router.api.http.sse import EventStream, describe_events
from loraplex_router.api.turns import in_turn
from loraplex_router.engine.output import Generation
from loraplex_router.service.service import Service
from loraplex_router.vocabulary.request import MAX_N, MAX_STOPS
from loraplex_router.vocabulary.request import Request as InternalRequest

ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": schema.Error, "description": "No API key, or an unknown one."},
    403: {"model": schema.Error, "description": "The API key, or the adapter's source, does not allow the adapter."},
    404: {"model": schema.Error, "description": "No such adapter."},
    408: {"model": schema.Error, "description": "The body did not come in time."},
    413: {"model": schema.Error, "description": "The body is too large."},
    415: {"model": schema.Error, "description": "The body is compressed."},
    422: {"model": schema.Error, "description": "A field is wrong; the message names it."},
    424: {"model": schema.Error, "description": "The adapter's files cannot be served."},
    429: {"model": schema.Error, "description": "The queue is full, or a limit of the API key is reached."},
    499: {"model": schema.Error, "description": "The request was cancelled."},
    500: {"model": schema.Error, "description": "The generation failed."},
    502: {"model": schema.Error, "description": "The adapter's source does not answer."},
    503: {"model": schema.Error, "description": "Starting, shutting down, or a shard is lost."},
}
EVENTS = describe_events("A StreamResponse. There may be comments between events.")


def create_lorax_routes(service: Service) -> APIRouter:
    routes = APIRouter(tags=["LoRAX"], route_class=JsonRoute)

    def adapter_token(http: Request) -> str:
        """What LoRAX's clients send as Authorization is the adapter's token, unless this server takes API keys."""
        return "" if service.keys.required else api_key(http) or ""

    async def generate_whole(
        body: schema.GenerateRequest, http: Request, shape: Callable[[dict[str, Any]], Any]
    ) -> Response:
        """`shape` makes what is sent of the answer."""
        request = read_request(body, adapter_token(http), stream=False)
        generation = await service.generate(request, api_key(http))
        deltas = (await collect(service, [generation], http.receive))[0]
        headers = {**static_headers(service.info.model_id, body.inputs, request.adapter), **whole_headers(generation)}
        writer = _writer(body, generation)
        return await in_turn(generation.num_logprobs, lambda: JsonAnswer(shape(writer.whole(deltas)), headers=headers))

    async def generate_events(body: schema.GenerateRequest, http: Request) -> Response:
        request = read_request(body, adapter_token(http), stream=True)
        generation = await service.generate(request, api_key(http))
        headers = static_headers(service.info.model_id, body.inputs, request.adapter)
        events = _writer(body, generation).events()
        return EventStream(service, [generation], events, lorax_body, headers)

    def _writer(body: schema.GenerateRequest, generation: Generation) -> LoraxWriter:
        given = body.parameters or schema.Parameters()
        prefix = body.inputs if given.return_full_text else ""
        return LoraxWriter(generation, service.tokenizer, wants_details(given), prefix)

    @routes.post("/generate", responses={200: {"model": schema.GenerateResponse}, **ERRORS})
    async def generate(body: schema.GenerateRequest, http: Request) -> Response:
        """Answers once everything is generated."""
        return await generate_whole(body, http, lambda answer: answer)

    @routes.post("/generate_stream", response_class=Response, responses={200: {"content": EVENTS}, **ERRORS})
    async def generate_stream(body: schema.GenerateRequest, http: Request) -> Response:
        """One server-sent event per token."""
        return await generate_events(body, http)

    @routes.post("/", responses={200: {"model": list[schema.GenerateResponse], "content": EVENTS}, **ERRORS})
    @routes.post("/invocations", responses={200: {"model": list[schema.GenerateResponse], "content": EVENTS}, **ERRORS})
    async def compat_generate(body: schema.CompatGenerateRequest, http: Request) -> Response:
        """A list with one answer, or server-sent events if `stream` is true. What the Python clients call."""
        if body.stream:
            return await generate_events(body, http)
        return await generate_whole(body, http, lambda answer: [answer])

    @routes.get("/info", responses={200: {"model": schema.Info}, 401: ERRORS[401]})
    async def get_info(http: Request) -> Response:
        """The model and the limits of this server. Settings of LoRAX that mean nothing here are 0 or null."""
        service.keys.tenant(api_key(http))
        return JSONResponse(_info(service))

    error = {"model": schema.Error, "description": "A generation would not succeed now."}
    unhealthy: dict[int | str, dict[str, Any]] = {503: error}

    @routes.get("/health", response_class=Response, responses=unhealthy)
    @routes.get("/ping", response_class=Response, responses=unhealthy)
    async def health() -> Response:
        """200 if a generation would succeed now."""
        if service.healthy:
            return Response()
        return JSONResponse({"error": "unhealthy", "error_type": "healthcheck"}, 503)

    @routes.get("/", response_class=HTMLResponse, responses=unhealthy)
    async def root(http: Request) -> Response:
        """As /health, with a page of links."""
        if not service.healthy:
            return await health()
        model = "" if service.keys.required else service.info.model_id
        return HTMLResponse(front_page(model, str(http.base_url)), headers=FRONT_PAGE_HEADERS)

    @routes.get(
        "/startup", response_class=Response, responses={status: ERRORS[status] for status in (401, 429, 500, 503)}
    )
    async def startup(http: Request) -> Response:
        """200 once a token was generated for this call."""
        request = InternalRequest(prompt=(0,), max_new_tokens=1)
        generation = await service.generate(request, api_key(http))
        await collect(service, [generation], http.receive)
        return Response()

    return routes


def _info(service: Service) -> dict[str, Any]:
    info = service.info
    return {
        "model_id": info.model_id,
        "model_sha": None,
        "model_dtype": info.dtype,
        "model_device_type": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": service.max_queue,
        "max_best_of": MAX_N,
        "max_stop_sequences": MAX_STOPS,
        "max_input_length": info.max_model_len - 1,
        "max_total_tokens": info.max_model_len,
        "waiting_served_ratio": 0.0,
        "max_batch_total_tokens": info.kv_blocks * info.kv_block_size,
        "max_waiting_tokens": 0,
        "validation_workers": 0,
        "eager_prefill": True,
        "version": info.version,
        "sha": None,
        "docker_label": None,
        "request_logger_url": None,
    }
