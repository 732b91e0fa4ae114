"""Long lists as JSON, written a part at a time."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from typing import Any

import orjson

BATCH = 1000  # values written in one go


async def write_list(values: Iterable[Any]) -> AsyncIterator[bytes]:
    """As JSON, a part at a time: others have their turn between two."""
    yield b"["
    begun = False
    for batch in _batches(values):
        yield b"," * begun + orjson.dumps(batch)[1:-1]
        begun = True
        await asyncio.sleep(0)
    yield b"]"


def _batches(values: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(values)
    while batch := list(islice(iterator, BATCH)):
        yield batch
