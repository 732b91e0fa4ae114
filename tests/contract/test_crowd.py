"""Many streams over all faces at once, a third of which are closed midway."""

import asyncio
import json

from openai import AsyncOpenAI

from loraplex import AsyncClient
from tests.e2e.processes import Server

STREAMS = 64
TOKENS = 24
ADAPTERS = (None, "first", "second")


async def test_many_mixed_streams_of_which_a_third_leave_lose_no_request_and_no_block(server: Server):
    async with (
        AsyncClient(server.address) as grpc,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as openai,
    ):
        base = (await openai.models.list()).data[0].id

        async def over_grpc(adapter: str | None, leaves: bool) -> int:
            seen = 0
            async for piece in grpc.stream("crowd", adapter=adapter, max_new_tokens=TOKENS, ignore_eos=True):
                seen += len(piece.tokens)
                if leaves and seen >= 3:
                    break
            return seen

        async def over_openai(adapter: str | None, leaves: bool) -> int:
            stream = await openai.completions.create(
                model=adapter or base,
                prompt="crowd",
                max_tokens=TOKENS,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            async with stream:
                async for number, chunk in aenumerate(stream):
                    if leaves and number >= 3:
                        return number
                    if chunk.usage:
                        return chunk.usage.completion_tokens
            raise AssertionError("the stream ended without its usage")

        async def over_lorax(adapter: str | None, leaves: bool) -> int:
            seen = 0
            async for event in lorax_events(server.url, adapter):
                assert event["token"]["logprob"] is not None
                seen += 1
                if leaves and seen >= 3:
                    break
            return seen

        faces = over_grpc, over_openai, over_lorax
        leaves = [index % 3 == 0 for index in range(STREAMS)]
        seen = await asyncio.gather(*(faces[i // 3 % 3](ADAPTERS[i // 9 % 3], leaves[i]) for i in range(STREAMS)))
    assert all(count == TOKENS for count, left in zip(seen, leaves, strict=True) if not left)
    assert all(3 <= count <= TOKENS for count, left in zip(seen, leaves, strict=True) if left)
    server.assert_nothing_is_held()


async def aenumerate(items):
    number = 0
    async for item in items:
        yield number, item
        number += 1


async def lorax_events(url: str, adapter: str | None):
    """The events of /generate_stream; leaving the loop closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    parameters = {"adapter_id": adapter, "max_new_tokens": TOKENS, "ignore_eos_token": True}
    body = json.dumps({"inputs": "crowd", "parameters": parameters}).encode()
    head = f"POST /generate_stream HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
        assert b" 200 " in await reader.readline()
        while line := await reader.readline():
            if line.startswith(b"data:"):
                yield json.loads(line.removeprefix(b"data:"))
    finally:
        writer.close()
