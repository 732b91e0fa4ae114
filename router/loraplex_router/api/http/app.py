"""The HTTP application: the faces, behind what holds for all of them."""

from collections.abc import Sequence
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline

from loraplex_router.api.http import admin, lorax, messages, openai, playground, scoring, sglang
from loraplex_router.api.http.body_limit import BodyLimit
from loraplex_router.api.http.draining import Draining
from loraplex_router.api.http.face import face_of, install_faces
from loraplex_router.api.http.foreign_pages import ForeignPages, is_loopback
from loraplex_router.api.http.head_as_get import HeadAsGet
from loraplex_router.api.http.invocations import Invocations
from loraplex_router.api.http.rate_limits import RateLimits
from loraplex_router.api.http.slashes import Slashes
from loraplex_router.service.service import Service

FACES = (lorax.FACE, *openai.FACES, messages.FACE, admin.FACE, *scoring.FACES, *sglang.FACES, playground.FACE)


def create_app(
    service: Service, cors_origins: Sequence[str] = (), max_body: int = 8 << 20, host: str = "127.0.0.1"
) -> FastAPI:
    """`cors_origins`: whose web pages may call it, also as a browser shows their addresses; "*" is anybody's.
    `max_body`: the most bytes of a request. `host`: where it listens."""
    origins = [origin.rstrip("/").lower() for origin in cors_origins]  # as browsers send them
    app: FastAPI = FastAPIOffline(
        title="loraplex",
        version=version("loraplex"),
        summary="One base model, any number of LoRA adapters.",
        static_url="/docs-assets",
        favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},
    )
    app.add_middleware(Invocations)
    app.add_middleware(BodyLimit, limit=max_body, keys=service.keys, without=("/adapters/upload", "/v1/files"))
    app.add_middleware(HeadAsGet)
    for middleware in service.telemetry.middleware:
        app.add_middleware(middleware)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["*"],
    )
    if service.keys.required:
        app.add_middleware(RateLimits, keys=service.keys)
    elif "*" not in origins:
        app.add_middleware(
            ForeignPages,
            origins=origins,
            loopback=is_loopback(host),
            refuse=lambda path, error: face_of(path, FACES).answer(error),
        )
    app.add_middleware(Draining, service=service)
    app.add_middleware(Slashes)
    app.state.service = service
    install_faces(app, FACES)
    return app
