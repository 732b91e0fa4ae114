"""Sends a gRPC stream, unless its client does not read it."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc

READ_SECONDS = 120.0  # in which nothing of a stream is read, before it ends

Context = grpc.aio.ServicerContext[Any, Any]


class Sender:
    def __init__(self, answers: AsyncGenerator[Any], context: Context) -> None:
        self._answers = answers
        self._context = context
        self._began: float | None = None  # when the answer that is being sent was begun, by the event loop's clock

    async def send_all(self) -> bool:
        """Whether all answers were sent. If the client reads nothing for too long, `answers` is closed at once, but
        this only returns when the client reads or leaves: gRPC has no way to take back what it is about to send."""
        watching, clock = asyncio.create_task(self._watch()), asyncio.get_running_loop().time
        try:
            async for answer in self._answers:
                self._began = clock()
                await self._context.write(answer)
                self._began = None
            return not watching.done()
        finally:
            watching.cancel()
            await self._answers.aclose()

    async def _watch(self) -> None:
        """Closes the answers when one of them takes too long to send: they wait for that, so they can be closed."""
        clock = asyncio.get_running_loop().time
        while (left := (self._began or clock()) + READ_SECONDS - clock()) > 0:
            await asyncio.sleep(left)
        await self._answers.aclose()
