"""Whether a generation would succeed now, as LoRAX reports it."""

from fastapi import Response
from fastapi.responses import JSONResponse

from loraplex_router.api.http.errors import Error, Responses
from loraplex_router.service.service import Service

UNHEALTHY: Responses = {503: {"model": Error, "description": "A generation would not succeed now."}}


def answer_health(service: Service) -> Response:
    """An empty answer with status 200 or, if a generation would fail, an error with status 503."""
    if service.healthy:
        return Response()
    return JSONResponse({"error": "unhealthy", "error_type": "healthcheck"}, 503)
