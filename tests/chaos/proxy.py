"""A network that can be cut: a TCP proxy that stops forwarding. Nothing is lost, refused or closed meanwhile."""

import asyncio
import contextlib
from typing import Self


class Proxy:
    """Forwards connections to a port of this machine, while `joined` is set."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._calls: set[asyncio.Task[None]] = set()
        self.joined = asyncio.Event()
        self.joined.set()

    async def start(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def lose(self) -> None:
        """Nothing comes through the connections of now any more; later ones are forwarded."""
        self.joined.clear()
        self.joined = asyncio.Event()
        self.joined.set()

    async def close(self) -> None:
        self._server.close()
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = asyncio.create_task(self._forward(reader, writer))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        joined = self.joined
        with contextlib.closing(writer), contextlib.suppress(OSError):
            await joined.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            await asyncio.gather(_pump(reader, back, joined), _pump(there, writer, joined))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, joined: asyncio.Event) -> None:
    with contextlib.closing(writer), contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            await joined.wait()
            writer.write(data)
            await writer.drain()
