"""Reads request bodies as JSON, within limits and without invalid text."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from loraplex_router.text.json_limits import parse_body


class JsonRequest(Request):
    async def json(self) -> Any:
        """Raises json.JSONDecodeError, which FastAPI expects. Its message says what is wrong with the body."""
        try:
            return await parse_body(await self.body())
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class JsonAnswer(JSONResponse):
    """Serializes several times as fast as the standard library, which holds the interpreter's lock meanwhile."""

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class JsonRoute(APIRoute):
    """A route that reads its body with these limits."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def with_strict_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return with_strict_json
