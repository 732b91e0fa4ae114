"""Uvicorn's HTTP connection, with limits that it lacks: on the time and size of a request's headers, on the rest of a
body after its request was answered, on requests that are sent before the last one is answered, and on the time for
which a client reads nothing of an answer, or its host is silent. Offers to speak another protocol are ignored."""

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from loraplex_protos.tcp import keep_alive
from loraplex_router.api.descriptors import IdleConnections

# Before a request. Load balancers keep connections for up to ten minutes (Google's 600 s, nginx's and AWS's 60 s). If
# the server closed one first, a request that was just being sent on it would be answered with a 502.
IDLE_SECONDS = 620
HEADER_SECONDS = 20.0  # from a request's first byte to the end of its headers
MAX_HEADERS = 2**16  # bytes, the URL included
READ_SECONDS = 120.0  # without a byte read of an answer, before the client is given up
SILENCE_SECONDS = 120  # of a client's host, which may be gone without a word
REST_SECONDS = 60.0  # for the rest of a body that nobody reads
MAX_REST = 2**26  # bytes of it
MAX_PIPELINED = 32  # requests; each is read as soon as it arrives, thousands within one part of the stream
TOO_MANY = f"more than {MAX_PIPELINED} requests were sent before the first was answered"
UPGRADE = b"upgrade:"
OFFER = re.compile(rb"\n%b[^\n]*(?=\n)" % UPGRADE, re.IGNORECASE)
END = b"\n\r\n"  # of a request's headers
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Connection(HttpToolsProtocol):
    """Closes connections that take too long or send too much."""

    idle = IdleConnections()  # of the process, whose descriptors they take
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _in_headers = True
    _headers = _rest = 0  # bytes
    _held = b""  # the beginning of a line that may be an offer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout_keep_alive = IDLE_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        keep_alive(transport.get_extra_info("socket"), SILENCE_SECONDS)
        self.idle.make_room(len(self.connections))
        self.idle.add(transport)
        self._wait(IDLE_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_watching()
        self.idle.remove(self.transport)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._headers += len(data)
            data = self._without_offer(data)
        elif self.cycle is not None and self.cycle.response_complete:
            self._rest += len(data)
        super().data_received(data)
        if self._in_headers and self._headers > MAX_HEADERS:
            self.transport.write(TOO_LARGE)
            self.transport.close()
        if self._rest > MAX_REST:
            self.transport.close()

    def _without_offer(self, data: bytes) -> bytes:
        """Java's HTTP client offers HTTP/2 with each request (Upgrade: h2c). The parser would leave out the request's
        body, taking it for the other protocol's."""
        headers, end, body = (self._held + data).partition(END)
        self._held = b""
        if not end and (line := headers.rfind(b"\n")) >= 0:
            begun = headers[line + 1 :].lower()
            if begun.startswith(UPGRADE) or UPGRADE.startswith(begun) or begun == b"\r":
                headers, self._held = headers[:line], headers[line:]
        return OFFER.sub(b"", headers + end) + body

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError(TOO_MANY)  # which the parser only reports as an invalid request
        super().on_message_begin()
        self._in_headers = True
        self._headers = self._rest = 0
        self._wait(HEADER_SECONDS)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._stop_waiting()
        self.idle.remove(self.transport)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_headers, self._headers = True, 0  # what comes next begins with headers
        self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.cycle.more_body:
            self._wait(REST_SECONDS)
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self.idle.add(self.transport)

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(TOO_MANY if len(self.pipeline) >= MAX_PIPELINED else msg)

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._late = self.loop.call_later(seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _watch(self) -> None:
        """Nothing more is written meanwhile, so what waits to be read can only become less."""
        self._unread = self.loop.call_later(READ_SECONDS, self._check_read, self.transport.get_write_buffer_size())

    def _check_read(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch()
        else:
            self.transport.abort()

    def _stop_watching(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
