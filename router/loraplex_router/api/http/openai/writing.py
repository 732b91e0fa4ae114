"""What completions and chat completions write alike: identity, usage, and the pace of a stream."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from loraplex_router.api.http.disconnects import read
from loraplex_router.api.http.openai.schema import StreamOptions
from loraplex_router.engine.output import Delta, Generation
from loraplex_router.vocabulary.sequence import FinishReason

FINISH_REASONS = {
    None: None,
    FinishReason.LENGTH: "length",
    FinishReason.END_TOKEN: "stop",
    FinishReason.STOP_TEXT: "stop",
}


def common_fields(kind: str, prefix: str, generation: Generation, model: str, version: str) -> dict[str, Any]:
    """The fields that every answer and chunk begins with."""
    return {
        "id": f"{prefix}-{generation.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"loraplex-{version}",
    }


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """Each prompt counts once, however many sequences it has."""
    prompts = [generation.outputs[0].sequence for generation in generations]
    prompt = sum(sequence.prompt_length for sequence in prompts)
    completion = sum(output.generated for generation in generations for output in generation.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(sequence.prefix_hit for sequence in prompts)},
    }


def usage_so_far(options: StreamOptions | None, generations: Sequence[Generation]) -> dict[str, Any]:
    """What a chunk of a stream has of it: nothing, unless it was asked for; null, unless it was for every chunk."""
    if not options or not options.include_usage:
        return {}
    return {"usage": usage(generations) if options.continuous_usage_stats else None}


async def read_all(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Delta]]:
    """(index of the choice, what is new of it) from several generations at once. Choices are numbered through. Nothing
    more is taken from a generation while its last delta was not read."""
    if len(generations) == 1:
        async for index, delta in read(generations[0]):
            yield index, delta
        return
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue(1)
    readers = [asyncio.create_task(_feed(queue, *numbered)) for numbered in _numbered(generations)]
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
    """Each generation with the index of its first choice."""
    first = 0
    for generation in generations:
        yield first, generation
        first += len(generation.outputs)


async def _feed(
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None], first: int, generation: Generation
) -> None:
    try:
        async for index, delta in read(generation):
            await queue.put((first + index, delta))
        await queue.put(None)
    except Exception as error:
        await queue.put(error)
