"""Ends an HTTP client's work when it disconnects."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.types import Receive

from loraplex_protos.errors import RequestCancelledError
from loraplex_router.engine.delta import Delta
from loraplex_router.engine.generation import Generation
from loraplex_router.service.service import Service
from loraplex_router.vocabulary.sequence import FinishReason

T = TypeVar("T")


@asynccontextmanager
async def while_connected(service: Service, generations: Sequence[Generation], receive: Receive) -> AsyncIterator[None]:
    """Closes the generations at the end. If the client disconnects earlier, they are cancelled, which ends their
    deltas.

    `receive` belongs to a request whose body has been read.
    """
    watch = asyncio.create_task(_cancel_when_disconnected(service, generations, receive))
    try:
        yield
    finally:
        watch.cancel()
        for generation in generations:
            service.requests.close(generation)


async def _cancel_when_disconnected(service: Service, generations: Sequence[Generation], receive: Receive) -> None:
    await _disconnected(receive)
    for generation in generations:
        service.requests.cancel(generation)


async def read(generation: Generation) -> AsyncIterator[tuple[int, Delta]]:
    """The generation's deltas. Raises RequestCancelledError if it was cancelled, because HTTP has no such end."""
    async for index, delta in generation.deltas():
        _refuse_cancelled(delta)
        yield index, delta


async def collect(service: Service, generations: Sequence[Generation], receive: Receive) -> list[list[Delta]]:
    """The whole answers: one delta per sequence, for each generation. Closes them. Raises the error that ended one."""
    async with while_connected(service, generations, receive):
        answers = [await generation.collect() for generation in generations]
    for delta in (delta for answer in answers for delta in answer):
        _refuse_cancelled(delta)
    return answers


def _refuse_cancelled(delta: Delta) -> None:
    if delta.finish_reason is FinishReason.CANCELLED:
        raise RequestCancelledError("the request was cancelled")


async def finish_before_disconnect(work: Coroutine[None, None, T], receive: Receive) -> T:
    """The work's result. If the client disconnects earlier, cancels the work and raises RequestCancelledError."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RequestCancelledError("the client has disconnected")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
