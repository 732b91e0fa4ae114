"""The HTTP face: /health and /metrics."""

from collections.abc import Callable

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest


def create_app(healthy: Callable[[], bool], registry: CollectorRegistry) -> FastAPI:
    """`healthy` tells whether a generation would succeed now."""
    app = FastAPI(title="loraplex")

    @app.get("/health", summary="200 if a generation would succeed now, else 503.")
    async def health() -> Response:
        return Response(status_code=200 if healthy() else 503)

    @app.get("/metrics", summary="Prometheus metrics.")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app
