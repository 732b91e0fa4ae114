"""Routes for operators and their tools: health, the model, the limits, metrics, and this API's description."""

import asyncio
import threading
from dataclasses import asdict
from datetime import UTC, date, datetime
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from loraplex_protos.generation_pb2 import GetModelInfoResponse
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.disconnects import collect
from loraplex_router.api.http.errors import LORAX_ERRORS, only
from loraplex_router.api.http.health import UNHEALTHY, answer_health
from loraplex_router.api.http.json_body import JsonAnswer
from loraplex_router.api.http.lorax import schema
from loraplex_router.api.turns import in_turn
from loraplex_router.vocabulary.checks import MAX_N, MAX_STOPS
from loraplex_router.vocabulary.request import EmbedRequest
from loraplex_router.vocabulary.request import Request as InternalRequest

NUMBERS = 4  # of a line of usage
First = Annotated[date | None, Query(alias="from", description="the first day, in UTC")]
Last = Annotated[date | None, Query(alias="to", description="the last day, in UTC")]

router = APIRouter()
_describing = threading.Lock()


@router.get("/info", tags=["LoRAX"], responses={200: {"model": schema.Info}, 401: LORAX_ERRORS[401]})
async def get_info(call: Call) -> Response:
    """The model and the limits of this server. Settings of LoRAX that mean nothing here are 0 or null."""
    call.service.keys.tenant(call.key)
    info = call.service.info
    return JSONResponse(
        schema.Info(
            model_id=info.model_id,
            model_dtype=info.dtype,
            model_pipeline_tag=_pipeline_tag(info),
            max_concurrent_requests=call.service.requests.max_queue,
            max_best_of=MAX_N,
            max_stop_sequences=MAX_STOPS,
            max_input_length=info.max_model_len - 1,
            max_total_tokens=info.max_model_len,
            max_batch_total_tokens=info.kv_blocks * info.kv_block_size,
            version=info.version,
        ).model_dump()
    )


def _pipeline_tag(info: GetModelInfoResponse) -> str:
    """As the hub has it."""
    if info.HasField("classifier"):
        return "token-classification" if info.classifier.of_tokens else "text-classification"
    return "feature-extraction" if info.embeds_only else "text-generation"


@router.get("/health", tags=["LoRAX"], response_class=Response, responses=UNHEALTHY)
@router.get("/ping", tags=["LoRAX"], response_class=Response, responses=UNHEALTHY)
@router.post("/ping", tags=["LoRAX"], response_class=Response, responses=UNHEALTHY)
async def health(call: Call) -> Response:
    """200 if a generation would succeed now."""
    return answer_health(call.service)


@router.get("/startup", tags=["LoRAX"], response_class=Response, responses=only(LORAX_ERRORS, 401, 429, 500, 503))
async def startup(call: Call) -> Response:
    """200 once a token has been generated for this call, or embedded by an embedding model."""
    if call.service.info.embeds_only:
        await call.service.pooling.embed(EmbedRequest(((0,),)), call.key)
        return Response()
    generation = await call.service.generate(InternalRequest(prompt=(0,), max_new_tokens=1), call.key)
    await collect(call.service, [generation], call.receive)
    return Response()


@router.get("/openapi.json", include_in_schema=False)
@router.get("/api-doc/openapi.json", include_in_schema=False)
async def document(http: Request) -> Response:
    """The OpenAPI document, at FastAPI's path and at LoRAX's. Making it takes half a second, once: on a thread, so that
    no stream waits."""
    return JSONResponse(await asyncio.to_thread(_describe, http.app))


def _describe(app: FastAPI) -> dict[str, Any]:
    with _describing:
        return app.openapi()


@router.get("/version", tags=["Operation"])
async def show_version(http: Request) -> dict[str, str]:
    """The server's version, as vLLM reports it."""
    return {"version": http.app.version}


@router.get("/load", tags=["Operation"], responses=only(LORAX_ERRORS, 401))
async def load(call: Call) -> dict[str, int]:
    """How many requests are waiting or running, as vLLM reports it."""
    call.service.keys.tenant(call.key)
    return {"server_load": call.service.requests.num_running}


@router.get("/usage", tags=["Operation"], responses={200: {"model": schema.Usage}, **only(LORAX_ERRORS, 401, 422, 503)})
async def usage(call: Call, first: First = None, last: Last = None) -> Response:
    """What the API key's tenant has used with each adapter; for an administrator, what all tenants have. With a Redis
    server (`--store`), at all routers that share it; otherwise at this one since it started."""
    since, rows = await call.service.usage(call.key, first, last)

    def write() -> JsonAnswer:
        written = [{"tenant": tenant or None, "adapter": adapter, **asdict(used)} for tenant, adapter, used in rows]
        began = datetime.fromtimestamp(since, UTC).isoformat(timespec="seconds")
        return JsonAnswer({"since": began, "usage": written})

    return await in_turn(NUMBERS * len(rows), write)


@router.get("/metrics", response_class=Response, tags=["Operation"], responses=only(LORAX_ERRORS, 401, 403))
async def metrics(call: Call) -> Response:
    """Prometheus metrics."""
    return Response(await call.service.scrape(call.key), media_type=CONTENT_TYPE_LATEST)
