"""An OpenAI-style server: streamed /completions, whose `model` is an adapter's name or the base model's.

Speaks HTTP/1.0, in which an answer is not chunked and ends with the connection: that is all a stream of lines needs.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from bench.load import LoadError, Request


class OpenAiTarget:
    """`ignore_eos`, and prompts of token ids, as vLLM and SGLang read them, are beyond OpenAI's own interface."""

    def __init__(self, address: str) -> None:
        """`address` is host:port/path."""
        self._host, _, path = address.partition("/")
        self._path = f"/{path}".rstrip("/")
        self._models: list[str] = []

    async def adapters(self) -> list[str]:
        """The models that the server lists after its first, which is the base model."""
        return (await self._list())[1:]

    async def generate(self, request: Request) -> AsyncIterator[int]:
        body = {
            "model": request.adapter or (await self._list())[0],
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        received = 0
        async with self._answer("POST", "/completions", json.dumps(body)) as lines:
            async for line in lines:
                event = line.removeprefix(b"data:").strip()
                if event == line.strip() or event == b"[DONE]":
                    continue
                chunk = json.loads(event)
                if any(choice["text"] for choice in chunk["choices"]):
                    received += 1
                    yield 1
                if chunk.get("usage") and chunk["usage"]["completion_tokens"] > received:
                    yield chunk["usage"]["completion_tokens"] - received  # came with others, or without text
                    received = chunk["usage"]["completion_tokens"]

    async def close(self) -> None:
        pass

    async def _list(self) -> list[str]:
        if not self._models:
            async with self._answer("GET", "/models", "") as lines:
                answer: dict[str, Any] = json.loads(b"".join([line async for line in lines]))
            self._models = [model["id"] for model in answer["data"]]
        return self._models

    @asynccontextmanager
    async def _answer(self, method: str, path: str, body: str) -> AsyncIterator[asyncio.StreamReader]:
        """The body's lines. Raises LoadError if the status is not 200."""
        host, _, port = self._host.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port or 80), limit=2**20)
        try:
            content = body.encode()
            head = (
                f"{method} {self._path}{path} HTTP/1.0\r\nHost: {self._host}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            )
            writer.write(head.encode() + content)
            await writer.drain()
            try:
                status = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1]
            except EOFError:
                raise LoadError(f"{method} {path}: the server closed the connection without an answer") from None
            if status != b"200":
                raise LoadError(f"{method} {path}: {int(status)}: {(await reader.read()).decode(errors='replace')}")
            yield reader
        finally:
            writer.close()
            await writer.wait_closed()
