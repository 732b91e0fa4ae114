"""Two hundred schemas on the real model, sampled at random, in a batch with plain requests."""

import asyncio
import json
from random import Random

import jsonschema

from loraplex import AsyncClient, FinishReason, JsonSchema
from tests.e2e.processes import Server
from tests.random_schemas import random_document_schema

MESSAGES = [{"role": "user", "content": "Make up some data."}]
COUNT, STREAMS = 200, 32


async def ask(client: AsyncClient, seed: int, limit: asyncio.Semaphore) -> bool:
    """Whether the document is complete; if it is, it must be valid."""
    schema = random_document_schema(Random(seed))
    async with limit:
        whole = await client.generate(
            MESSAGES, grammar=JsonSchema(schema), temperature=1.0, seed=seed, max_new_tokens=400
        )
    if whole.sequences[0].finish_reason is FinishReason.LENGTH:
        return False
    jsonschema.Draft202012Validator(schema).validate(json.loads(whole.text))
    return True


async def chatter(client: AsyncClient) -> None:
    for number in range(4):
        whole = await client.generate(f"Item {number}:", temperature=1.0, max_new_tokens=24, ignore_eos=True)
        assert whole.sequences[0].usage.generated_tokens == 24


async def run(address: str) -> None:
    async with AsyncClient(address) as client:
        limit = asyncio.Semaphore(STREAMS)
        async with asyncio.TaskGroup() as group:
            documents = [group.create_task(ask(client, seed, limit)) for seed in range(COUNT)]
            group.create_task(chatter(client))
    assert all(document.result() for document in documents)


def test_the_real_model_gives_a_valid_document_for_every_schema_beside_plain_requests() -> None:
    with Server("--kv-blocks=1024") as server:
        asyncio.run(run(server.address))
        server.assert_nothing_is_held()
