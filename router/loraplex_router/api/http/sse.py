"""Server-sent events: one write per event, and errors after the first byte as events."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from loraplex_protos.errors import LoraplexError
from loraplex_router.api.http.disconnects import read, while_connected
from loraplex_router.api.http.errors import internal_error
from loraplex_router.api.readers import Deltas, read_each
from loraplex_router.engine.delta import Delta
from loraplex_router.engine.generation import Generation
from loraplex_router.journal.stream import Stream
from loraplex_router.service.service import Service
from loraplex_router.text.json_lines import dump_line

KEEP_ALIVE_SECONDS = 15.0  # as in LoRAX
COMMENT = b":\n\n"
DONE = b"data: [DONE]\n\n"


def describe_events(description: str) -> dict[str, Any]:
    """A streamed answer in the OpenAPI document, from the schema of its events' data."""
    data = {"type": "string", "description": description}
    return {"text/event-stream": {"schema": {"type": "object", "properties": {"data": data}}}}


def event(data: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % dump_line(data)


def named_event(data: Mapping[str, Any]) -> bytes:
    """An event that has its data's type as its name."""
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode(), dump_line(data))


class EventStream(Response):
    """Streams admitted generations, and closes them. `events` writes their deltas, those of each delta together;
    `write_error` turns an error into the last event. With a `stream`, events have ids, and those that the client has
    already are left out.

    While the client does not read, the generations' deltas are merged. While there is nothing to send, occasional
    comments, or what else `keep_alive` is, keep proxies from taking the stream for dead.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        service: Service,
        generations: Sequence[Generation],
        events: Callable[[Deltas], AsyncIterator[bytes]],
        write_error: Callable[[LoraplexError], Mapping[str, Any]],
        headers: Mapping[str, str] | None = None,
        write_event: Callable[[Mapping[str, Any]], bytes] = event,
        keep_alive: bytes = COMMENT,
        stream: Stream | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]  # unknown
        self._service = service
        self._generations = generations
        self._events = events(self._deltas())
        self._stream = stream
        self._delta: Delta | None = None  # that is being written
        self._afterwards = 0  # events written after the last delta
        self._write_error = write_error
        self._write_event = write_event
        self._idle = keep_alive
        self._quiet = True  # nothing has been sent since the last check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with while_connected(self._service, self._generations, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            keep_alive = asyncio.create_task(self._keep_alive(send))
            try:
                async for written in self._events:
                    if self._stream is not None:
                        written = self._with_ids(written, self._stream)
                    await self._send(send, written)
            except LoraplexError as error:
                await self._send(send, self._write_event(self._write_error(error)))
            except Exception:
                await self._send(send, self._write_event(self._write_error(internal_error())))
            finally:
                keep_alive.cancel()
            await send({"type": "http.response.body", "body": b""})

    async def _deltas(self) -> Deltas:
        async for index, delta in read_each(self._generations, read):
            self._delta = delta
            if self._stream is not None:
                await self._stream.advance(index, delta)
            yield index, delta
        self._delta = None

    def _with_ids(self, written: bytes, stream: Stream) -> bytes:
        """The events that the client does not have."""
        events = written.split(b"\n\n")[:-1]
        new = list[bytes]()
        for count, each in enumerate(events, 1):
            if self._delta is None:
                self._afterwards += 1
                known = stream.begun is not None and self._afterwards <= stream.begun.afterwards
                id = stream.position(afterwards=self._afterwards)
            else:
                known = count <= self._delta.known
                id = stream.position(count if count < len(events) else None)
            if not known:
                new.append((f"id: {id}\n".encode() if id else b"") + each + b"\n\n")
        return b"".join(new)

    async def _keep_alive(self, send: Send) -> None:
        while True:
            self._quiet = True
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            if self._quiet:
                await self._send(send, self._idle)

    async def _send(self, send: Send, written: bytes) -> None:
        if not written:
            return
        self._quiet = False
        await send({"type": "http.response.body", "body": written, "more_body": True})
