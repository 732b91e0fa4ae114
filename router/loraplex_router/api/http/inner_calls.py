"""Requests that this process makes to its own HTTP API, without a network."""

import asyncio
from typing import Any

import orjson
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message

from loraplex_router.access.keys import Keys


class InnerCalls:
    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def post(self, tenant: str, path: str, body: dict[str, Any]) -> tuple[int, Headers, dict[str, Any]]:
        """Makes a background request for a tenant. Returns the status, the headers and the answer."""
        headers = {"content-type": "application/json", "host": "localhost", "priority": "u=7"}
        if key := self._keys.key_for(tenant):
            headers["authorization"] = f"Bearer {key}"
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": None,
            "server": None,
        }
        messages: list[Message] = [{"type": "http.request", "body": orjson.dumps(body)}]
        sent, answered = list[Message](), asyncio.Event()

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await answered.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                answered.set()

        try:
            await self._app(scope, receive, send)
        except (
            Exception
        ):  # of a route: it was answered with a 500, logged, and is raised again for a server like uvicorn
            if not answered.is_set():
                raise
        content = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], Headers(raw=sent[0]["headers"]), orjson.loads(content)
