"""A request that kills real shards fails alone, and its neighbours get all of their tokens."""

import asyncio
from pathlib import Path

import pytest

from loraplex import AsyncClient, FinishReason, GenerationError
from loraplex_router.engine.suspects import CONVICTING_LOSSES
from tests.e2e.mortal_shard import DIED, KILLING, RAISING
from tests.e2e.processes import MortalShard, Router
from tests.e2e.tiny import Oracle, byte_tokenizer


async def test_a_request_that_kills_shards_is_the_only_one_that_fails(model: Path, oracle: Oracle, tmp_path: Path):
    listen = f"unix:{tmp_path}/shard"
    with (
        Router(f"--shards={listen}", "--move-seconds=120") as router,
        MortalShard(f"--model={model}", f"--listen={listen}", "--kv-blocks=512", "--threads=1") as shard,
    ):
        async with AsyncClient(router.address) as client:
            await asyncio.to_thread(router.wait_until, "loraplex_replicas", 1, 120)
            await its_neighbours_get_all_of_their_tokens(client, oracle, RAISING)
            assert DIED not in shard.log
            await its_neighbours_get_all_of_their_tokens(client, oracle, KILLING)
            assert shard.log.count(DIED) == CONVICTING_LOSSES
        router.assert_nothing_is_held()
        shard.kill()


async def its_neighbours_get_all_of_their_tokens(client: AsyncClient, oracle: Oracle, deadly: int) -> None:
    prompts = [byte_tokenizer().encode(text) for text in ("one", "two", "three")]
    streams = [client.stream(prompt, max_new_tokens=200, ignore_eos=True) for prompt in prompts]
    seen = [[await anext(stream)] for stream in streams]
    with pytest.raises(GenerationError, match="failed while working on this request"):
        await client.generate([5, deadly, 5], max_new_tokens=4)
    for stream, prompt, events in zip(streams, prompts, seen, strict=True):
        events += [event async for event in stream]
        assert events[-1].finish_reason is FinishReason.LENGTH
        assert [token.id for event in events for token in event.tokens] == oracle.generate(prompt, None, 200)[0]
