"""Reads requests' bodies as JSON whose every string is text."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json


class JsonRequest(Request):
    async def json(self) -> Any:
        """Raises json.JSONDecodeError, also where the standard library would not: half a surrogate pair is no
        character, and nothing that takes text takes it."""
        body = await self.body()
        try:
            return from_json(body)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class JsonRoute(APIRoute):
    """A route whose body is read so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def with_strict_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return with_strict_json
