"""Faces, and which face answers an error."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from loraplex_protos.errors import InvalidRequestError, LoraplexError, quote
from loraplex_router.api.http.errors import error_headers, read_error, rename_fields
from loraplex_router.api.http.other_servers import HINTS


@dataclass(frozen=True, slots=True)
class Face:
    """An API that clients speak over HTTP: a folder beside this file. `app.py` lists them all."""

    prefix: str  # of all its paths; "" is the face for all other paths
    routers: Sequence[APIRouter]  # with paths after the prefix; the most frequent come first
    write_error: Callable[[LoraplexError], Mapping[str, Any]]  # an error's body
    field_names: Mapping[str, str] = field(default_factory=dict)  # see `rename_fields`
    invalid_status: int = InvalidRequestError.http_status

    def has(self, path: str) -> bool:
        return not self.prefix or f"{path}/".startswith(f"{self.prefix}/")

    def answer(self, error: LoraplexError) -> Response:
        """The response to a request that failed before anything was sent."""
        status = self.invalid_status if isinstance(error, InvalidRequestError) else error.http_status
        body = self.write_error(rename_fields(error, self.field_names))
        return JSONResponse(body, status, error_headers(error))


def install_faces(app: FastAPI, faces: Sequence[Face]) -> None:
    """Adds the faces' routes and error handlers. The path's face answers an error, even if there is no such route."""
    documents = app.router.routes.copy()
    # Routes are tried in order: the most frequent come first, the document's pages last.
    for routers in zip_longest(*(face.routers for face in faces)):
        for face, router in zip(faces, routers, strict=True):
            if router:
                app.include_router(router, prefix=face.prefix)
    del app.router.routes[: len(documents)]
    app.router.routes += documents

    routes = [(face, route) for face in faces for router in face.routers for route in router.routes]
    paths = sorted({face.prefix + route.path for face, route in routes if isinstance(route, APIRoute)})

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404:
            hint = HINTS.get(request.url.path) or f"is not one of {', '.join(paths)}"
            error = HTTPException(404, f"Not Found: {quote(request.url.path)} {hint}")
        return face_of(request.url.path, faces).answer(read_error(error))

    for kind in (LoraplexError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer)


def build_routes(app: FastAPI) -> None:
    """Builds what FastAPI otherwise builds of all routes when they are first compared with a request, which would
    delay the streams of others by a tenth of a second."""
    for route in app.router.routes:
        route.matches({"type": "http", "method": "GET", "path": "\0", "headers": []})


def face_of(path: str, faces: Sequence[Face]) -> Face:
    """The face with the longest prefix of the path."""
    return max((face for face in faces if face.has(path)), key=lambda face: len(face.prefix))
