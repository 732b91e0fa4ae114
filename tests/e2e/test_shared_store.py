"""Two routers that share a Redis server: limits hold over both, and a killed router's usage is exact to the token."""

import asyncio
import json
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from loraplex import AsyncClient, RateLimitedError
from loraplex_router.access.limit_store import LEASE_SECONDS
from tests.e2e.processes import Router, Shard
from tests.redis_server import redis_server
from tests.tools import needs_redis

pytestmark = needs_redis

TOKENS, PROMPT = 120, "The quick"
STREAMS = 10  # of each of two tenants
KEYS = """
tenants:
  loyal: {keys: [%s]}
  fickle: {keys: [%s], adapters: [r4]}
  narrow: {keys: [%s], max_requests: 3}
  operator: {keys: [%s], admin: true}
"""


def usage(router: Router, key: str = "operator") -> dict[tuple[str, str], dict[str, Any]]:
    request = Request(f"{router.url}/usage", headers={"Authorization": f"Bearer {key}"})
    with urlopen(request, timeout=30) as answer:
        return {(each["tenant"], each["adapter"]): each for each in json.load(answer)["usage"]}


async def test_limits_and_usage_are_those_of_all_routers(model: Path, adapters: Path, tmp_path: Path):
    names = ("loyal", "fickle", "narrow", "operator")
    (tmp_path / "keys.yaml").write_text(KEYS % tuple(sha256(name.encode()).hexdigest() for name in names))
    log = tmp_path / "usage.jsonl"

    def start_shard(number: int) -> Shard:
        address = f"--listen=unix:{tmp_path}/{number}"
        return Shard(f"--model={model}", f"--adapters={adapters}", address, "--kv-blocks=1024", "--threads=1")

    def start_router(number: int) -> Router:
        flags = f"--api-keys={tmp_path}/keys.yaml", f"--usage-log={log}", f"--store={store}"
        return Router(f"--shards=unix:{tmp_path}/{number}", "--drain-seconds=0", *flags)

    with (
        redis_server(tmp_path) as (store, _),
        start_shard(0),
        start_shard(1),
        start_router(0) as first,
        start_router(1) as second,
    ):
        for router in (first, second):
            await asyncio.to_thread(router.wait_until, "loraplex_replicas", 1, 120)
        both, alone = f"ipv4:{first.address},{second.address}", first.address
        begun, received = asyncio.Semaphore(0), Counter[str]()

        async def read(client: AsyncClient, tenant: str, tokens: int = TOKENS, **options: Any) -> None:
            count = 0
            async for piece in client.stream(PROMPT, max_new_tokens=tokens, ignore_eos=True, **options):
                received[tenant] += len(piece.tokens)
                count += 1
                if count == 5:
                    begun.release()

        async with (
            AsyncClient(both, api_key="loyal", max_retries=8) as loyal,
            AsyncClient(alone, api_key="fickle", max_retries=0) as fickle,
            AsyncClient(first.address, api_key="narrow", max_retries=0) as here,
            AsyncClient(second.address, api_key="narrow", max_retries=0) as there,
        ):
            long = [asyncio.create_task(read(client, "narrow", 8000)) for client in (here, here, there)]
            for _ in long:
                await begun.acquire()
            for client in (here, there):
                with pytest.raises(RateLimitedError, match="3 requests at once"):
                    await client.generate(PROMPT, max_new_tokens=1)
            reading = [asyncio.create_task(read(loyal, "loyal")) for _ in range(STREAMS)]
            lost = [asyncio.create_task(read(fickle, "fickle", adapter="r4")) for _ in range(STREAMS)]
            for _ in (*reading, *lost):
                await begun.acquire()
            first.process.kill()
            killed = time.monotonic()
            await asyncio.gather(*reading)
            assert all(await asyncio.gather(*lost, *long[:2], return_exceptions=True))
            while True:
                try:
                    await there.generate(PROMPT, max_new_tokens=1)
                    break
                except RateLimitedError:
                    assert time.monotonic() < killed + LEASE_SECONDS + 5
                    await asyncio.sleep(0.2)
            long[2].cancel()

        def events() -> list[dict[str, Any]]:
            found = [json.loads(line) for line in log.read_text().splitlines()]
            return list({event["id"]: event for event in found}.values())

        deadline = time.monotonic() + 30
        while sum(event["outcome"] == "lost" and event["tenant"] != "loyal" for event in events()) < STREAMS + 2:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        await asyncio.to_thread(second.assert_nothing_is_held)
        found, told = await asyncio.to_thread(usage, second), Counter[tuple[str, str]]()
        for event in events():
            told[event["tenant"], "generated"] += event["generated_tokens"]
            told[event["tenant"], "prompt"] += event["prompt_tokens"]
        for (tenant, _), used in found.items():
            assert used["generated_tokens"] == told[tenant, "generated"]
            assert used["prompt_tokens"] == told[tenant, "prompt"] == used["requests"] * len(PROMPT)
        assert found["loyal", "[base]"]["generated_tokens"] == received["loyal"] == STREAMS * TOKENS
        assert found["loyal", "[base]"]["requests"] == STREAMS
        assert found["fickle", "r4"]["requests"] == STREAMS
        assert received["fickle"] <= found["fickle", "r4"]["generated_tokens"] < STREAMS * TOKENS
        assert (await asyncio.to_thread(usage, second, "fickle")).keys() == {("fickle", "r4")}
