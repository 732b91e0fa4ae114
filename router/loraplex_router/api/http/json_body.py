"""Reads request bodies as JSON, within limits and without invalid text.

Reading a long body takes tens of milliseconds, for which no stream would go on: a thread does it.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from loraplex_router.text.json_limits import LONG, parse

Validate = Callable[[Any], tuple[Any, list[Any]]]  # a JSON value -> the route's body, and what is wrong with it


class JsonRequest(Request):
    """`validate` is what FastAPI does with the body. `invalid` says what is wrong with a long one."""

    def __init__(self, request: Request, validate: Validate) -> None:
        super().__init__(request.scope, request.receive)
        self._validate = validate
        self.invalid: RequestValidationError | None = None

    async def json(self) -> Any:
        """Of a long body, the route's own object, which FastAPI takes as it is. Raises json.JSONDecodeError, which
        FastAPI expects. Its message says what is wrong with the body."""
        body = await self.body()
        try:
            return await asyncio.to_thread(self._read, body) if len(body) > LONG else parse(body)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error

    def _read(self, body: bytes) -> Any:
        sent = parse(body)
        found, errors = self._validate(sent)
        if errors:
            self.invalid = RequestValidationError(errors, body=sent)
            raise self.invalid
        return found if isinstance(found, BaseModel) else sent


class JsonAnswer(JSONResponse):
    """Serializes several times as fast as the standard library, which holds the interpreter's lock meanwhile."""

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class JsonRoute(APIRoute):
    """A route that reads its body with these limits."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, field = super().get_route_handler(), self.body_field

        def validate(sent: Any) -> tuple[Any, list[Any]]:
            return field.validate(sent, loc=("body",)) if field else (sent, [])

        async def with_strict_json(request: Request) -> Response:
            read = JsonRequest(request, validate)
            try:
                return await handle(read)
            except HTTPException as error:  # FastAPI's, for all else that was raised while the body was read
                raise read.invalid or error from None

        return with_strict_json
