"""Writes long lists as JSON, part by part."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from itertools import islice
from typing import Any

import orjson

BATCH = 1000  # values per part


async def write_list(values: Iterable[Any], batch: int = BATCH) -> AsyncIterator[bytes]:
    """The list as JSON, some values at a time; other tasks run between two parts."""
    async for part in write_parts(in_batches(values, batch)):
        yield part


async def write_parts(parts: AsyncIterator[list[Any]]) -> AsyncIterator[bytes]:
    """A list of the values in all parts as JSON."""
    yield b"["
    begun = False
    async for part in parts:
        if part:
            yield b"," * begun + orjson.dumps(part)[1:-1]
            begun = True
        await asyncio.sleep(0)
    yield b"]"


async def write_data(values: Iterable[Any], batch: int = BATCH, **others: Any) -> AsyncIterator[bytes]:
    """OpenAI's object with a list as its `data`, followed by other fields."""
    yield b'{"object":"list","data":'
    async for part in write_list(values, batch):
        yield part
    yield b"," + orjson.dumps(others)[1:]


async def in_batches(values: Iterable[Any], size: int = BATCH) -> AsyncIterator[list[Any]]:
    iterator = iter(values)
    while part := list(islice(iterator, size)):
        yield part
