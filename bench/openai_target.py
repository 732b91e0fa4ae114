"""An OpenAI-style server: streamed /completions, /chat/completions or /responses, whose `model` is an adapter's name or
the base model's.

Speaks HTTP/1.0, so the connection's end is the answer's. Uvicorn still chunks its answers, but there are line ends
between two chunks, so an answer is a stream of lines, some of which are events.
"""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from bench.load import LoadError, Request

Json = dict[str, Any]


class Form(NamedTuple):
    """One of the routes: how it is asked, and what its events say."""

    path: str
    body: Callable[[Request], Json]
    has_text: Callable[[Json], bool]
    total: Callable[[Json], int | None]  # of the answer's tokens, where it is told


def _asked_in_text(request: Request) -> str:
    return " ".join(map(str, request.prompt))


def _total(chunk: Json) -> int | None:
    usage = chunk.get("usage")
    return usage["completion_tokens"] if usage else None


USAGE = {"stream_options": {"include_usage": True}}
COMPLETIONS = Form(
    "/completions",
    lambda request: {"prompt": request.prompt, "max_tokens": request.output_tokens, **USAGE},
    lambda chunk: any(choice["text"] for choice in chunk["choices"]),
    _total,
)
CHAT = Form(
    "/chat/completions",
    lambda request: {
        "messages": [{"role": "user", "content": _asked_in_text(request)}],
        "max_tokens": request.output_tokens,
        **USAGE,
    },
    lambda chunk: any(choice["delta"].get("content") for choice in chunk["choices"]),
    _total,
)
RESPONSES = Form(
    "/responses",
    lambda request: {"input": _asked_in_text(request), "max_output_tokens": request.output_tokens},
    lambda event: event["type"] == "response.output_text.delta",
    lambda event: ((event.get("response") or {}).get("usage") or {}).get("output_tokens"),
)


class OpenAiTarget:
    """Uses two extensions of OpenAI's API that vLLM and SGLang have too: `ignore_eos`, and token ids as prompts of
    completions."""

    def __init__(self, address: str, form: Form = COMPLETIONS) -> None:
        """`address` is host:port/path."""
        self._form = form
        self._host, _, path = address.partition("/")
        self._path = f"/{path}".rstrip("/")
        self._models: list[str] = []

    async def adapters(self) -> list[str]:
        """The server's models except the first, which is the base model."""
        return (await self._list())[1:]

    async def generate(self, request: Request) -> AsyncIterator[int]:
        body = {
            "model": request.adapter or (await self._list())[0],
            **self._form.body(request),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        received = 0
        async with self._answer(self._form.path, json.dumps(body)) as lines:
            async for line in lines:
                event = line.removeprefix(b"data:").strip()
                if event == line.strip() or event == b"[DONE]":
                    continue
                chunk = json.loads(event)
                if self._form.has_text(chunk):
                    received += 1
                    yield 1
                total = self._form.total(chunk)
                if total is not None and total > received:
                    yield total - received  # these had no text of their own
                    received = total

    async def close(self) -> None:
        pass

    async def _list(self) -> list[str]:
        if not self._models:
            self._models = [model["id"] for model in (await asyncio.to_thread(self._read_models))["data"]]
        return self._models

    def _read_models(self) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"http://{self._host}{self._path}/models") as answer:
                models: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise LoadError(f"GET /models: {error.code}: {error.read().decode(errors='replace')}") from None
        except OSError:
            raise LoadError("GET /models: the server closed the connection without an answer") from None
        return models

    @asynccontextmanager
    async def _answer(self, path: str, body: str) -> AsyncIterator[asyncio.StreamReader]:
        """The body's lines. Raises LoadError if the status is not 200."""
        host, _, port = self._host.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port or 80), limit=2**20)
        try:
            content = body.encode()
            head = (
                f"POST {self._path}{path} HTTP/1.0\r\nHost: {self._host}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            )
            writer.write(head.encode() + content)
            await writer.drain()
            try:
                status = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1]
            except EOFError:
                raise LoadError(f"POST {path}: the server closed the connection without an answer") from None
            if status != b"200":
                raise LoadError(f"POST {path}: {int(status)}: {(await reader.read()).decode(errors='replace')}")
            yield reader
        finally:
            writer.close()
            await writer.wait_closed()
