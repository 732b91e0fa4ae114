"""Several generations, read as one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TypeAlias

from loraplex_router.engine.delta import Delta
from loraplex_router.engine.generation import Generation

Deltas: TypeAlias = AsyncIterator[tuple[int, Delta]]  # with the index of the answer that each is of
Read: TypeAlias = Callable[[Generation], Deltas]


async def read_each(generations: Sequence[Generation], read: Read) -> Deltas:
    """(index of the answer, its delta), read from each generation with `read`. Answers are numbered consecutively. A
    generation's next delta is only taken once its last one has been read."""
    if len(generations) == 1:
        async for index, delta in read(generations[0]):
            yield index, delta
        return
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue(1)
    readers = [asyncio.create_task(_feed(queue, *numbered, read)) for numbered in _numbered(generations)]
    try:
        ended = 0
        while ended < len(readers):
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                ended += 1
            else:
                yield item
    finally:
        for reader in readers:
            reader.cancel()


def _numbered(generations: Sequence[Generation]) -> Iterator[tuple[int, Generation]]:
    """Each generation with the index of its first answer."""
    first = 0
    for generation in generations:
        yield first, generation
        first += len(generation.outputs)


async def _feed(
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None], first: int, generation: Generation, read: Read
) -> None:
    try:
        async for index, delta in read(generation):
            await queue.put((first + index, delta))
        await queue.put(None)
    except Exception as error:
        await queue.put(error)
