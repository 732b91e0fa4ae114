"""The HTTP application: every face's routes, and Prometheus metrics."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST

from loraplex_router.api.http.admin.routes import create_admin_routes
from loraplex_router.api.http.body_limit import BodyLimit
from loraplex_router.api.http.errors import install_handlers
from loraplex_router.api.http.head_as_get import HeadAsGet
from loraplex_router.api.http.lorax.routes import create_lorax_routes
from loraplex_router.api.http.lorax.tokenizing import create_tokenizing_routes
from loraplex_router.api.http.openai.embeddings import create_embedding_routes
from loraplex_router.api.http.openai.routes import create_openai_routes
from loraplex_router.service.service import Service


def create_app(service: Service, cors_origins: Sequence[str] = ("*",), max_body: int = 8 << 20) -> FastAPI:
    """`cors_origins`: whose web pages may call it; "*" is anybody's. `max_body`: the most bytes of a request."""
    app: FastAPI = FastAPIOffline(
        title="loraplex",
        version=version("loraplex"),
        summary="One base model, any number of LoRA adapters.",
        static_url="/docs-assets",
        favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},
    )
    install_handlers(app)
    app.add_middleware(BodyLimit, limit=max_body)
    app.add_middleware(HeadAsGet)
    for middleware in service.telemetry.middleware:
        app.add_middleware(middleware)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["*"],
    )
    app.include_router(create_lorax_routes(service))
    app.include_router(create_openai_routes(service))
    app.include_router(create_embedding_routes(service))
    app.include_router(create_tokenizing_routes(service))
    app.include_router(create_admin_routes(service))

    @app.get("/api-doc/openapi.json", include_in_schema=False)
    async def document() -> dict[str, Any]:
        """Where LoRAX has it."""
        return app.openapi()

    @app.get("/version", tags=["Operation"])
    async def show_version() -> dict[str, str]:
        """The server's version, as vLLM."""
        return {"version": app.version}

    @app.get("/metrics", response_class=Response, tags=["Operation"])
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(await service.telemetry.scrape(), media_type=CONTENT_TYPE_LATEST)

    return app
