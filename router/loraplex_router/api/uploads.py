"""Reads uploaded files, of which only the announced size comes into memory."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import DeadlineError, FieldViolation, InvalidRequestError, LoraplexError
from loraplex_router.replicas.uploads import Announcement

SECONDS = 600.0  # for all of an upload
MAX_FILES = 64
REST_SECONDS, MOST_REST = 1.0, 64  # for messages that a refused client still sends


@asynccontextmanager
async def read_rest(messages: AsyncIterator[object]) -> AsyncIterator[None]:
    """A context whose LoraplexErrors wait until the client has sent the rest, if that is little: gRPC's Python client
    may report an internal error instead of the refusal if it comes while the client sends."""
    try:
        yield
    except LoraplexError:
        with suppress(LoraplexError, StopAsyncIteration, TimeoutError):
            async with asyncio.timeout(REST_SECONDS):
                for _ in range(MOST_REST):
                    await anext(aiter(messages))
        raise


async def receive(data: AsyncIterator[bytes], size: int) -> memoryview:
    """All of the data. Raises InvalidRequestError if it has not the size, DeadlineError if it takes too long."""
    received = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for part in data:
                received += part
                if len(received) > size:
                    raise InvalidRequestError(FieldViolation("data", f"has more than the {size} bytes announced"))
    except TimeoutError:
        raise DeadlineError(f"the upload was not complete after {SECONDS:g} seconds") from None
    if len(received) < size:
        missing = size - len(received)
        raise InvalidRequestError(FieldViolation("data", f"was cut short: {missing} of {size} bytes are missing"))
    return memoryview(received)


async def read_announcement(
    messages: AsyncIterator[pb.UploadAdapterRequest],
) -> tuple[Announcement, list[pb.UploadedFile]]:
    """What the first message says."""
    first = await anext(aiter(messages), pb.UploadAdapterRequest())
    if first.WhichOneof("part") != "header":
        raise InvalidRequestError(FieldViolation("header", "send it in the first message"))
    header = first.header
    names = [file.name for file in header.files]
    if not 0 < len(names) <= MAX_FILES or len(set(names)) < len(names):
        raise InvalidRequestError(FieldViolation("header.files", f"name 1 to {MAX_FILES} files, each once"))
    expected = header.expected_version if header.HasField("expected_version") else None
    return Announcement(header.name, sum(file.size_bytes for file in header.files), expected), list(header.files)


async def read_data(messages: AsyncIterator[pb.UploadAdapterRequest]) -> AsyncIterator[bytes]:
    """What the messages after the first one have."""
    async for message in messages:
        if message.WhichOneof("part") != "data":
            raise InvalidRequestError(FieldViolation("data", "every message but the first must have some"))
        yield message.data


def split(data: memoryview, files: Iterable[pb.UploadedFile]) -> dict[str, memoryview]:
    """The files' contents, by name."""
    contents = dict[str, memoryview]()
    for file in files:
        contents[file.name], data = data[: file.size_bytes], data[file.size_bytes :]
    return contents
