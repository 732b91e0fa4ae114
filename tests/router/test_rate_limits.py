"""What answers over HTTP say of a key's rates."""

import asyncio
import json

import pytest

from loraplex_router.access.keys import TenantSettings
from loraplex_router.api.http.rate_limits import duration
from tests.router.test_engine import Setup
from tests.router.test_http_streams import Client
from tests.router.test_keys import hashed

BODY = {"model": "base", "prompt": ["AB", "CD"], "max_tokens": 3}
RATES = {"requests_per_minute": 2, "tokens_per_minute": 1000}
TENANTS = {
    "limited": TenantSettings(keys=[hashed("limited")], **RATES),
    "free": TenantSettings(keys=[hashed("free")]),
}


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0, "0ms"), (0.0191, "20ms"), (1, "1s"), (59.5, "1m0s"), (360, "6m0s"), (431.2, "7m12s")],
)
def test_durations_are_written_as_openai_does(seconds: float, written: str) -> None:
    assert duration(seconds) == written


async def test_answers_and_refusals_say_what_is_left_of_a_keys_rates() -> None:
    setup = Setup(tenants=TENANTS)
    engine = asyncio.create_task(setup.engine.run())

    async def ask(key: str, path: str = "/v1/completions", body: object = BODY) -> Client:
        client = Client(setup, path, body, authorization=f"Bearer {key}")
        await client.run()
        return client

    answers = [await ask("limited") for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    (first, second), third = [json.loads("".join(answer.bodies)) for answer in answers[:2]], answers[2]
    assert third.headers["x-ratelimit-limit-requests"] == "2"
    assert third.headers["x-ratelimit-limit-tokens"] == "1000"
    assert int(third.headers["x-ratelimit-remaining-tokens"]) < 1000
    assert third.headers["x-ratelimit-reset-requests"].endswith("s")
    assert 0 < int(third.headers["retry-after"]) <= 30
    error = json.loads("".join(third.bodies))["error"]
    assert error["code"] == "rate_limited" and "2 requests a minute" in error["message"]
    for key in ("free", "wrong"):
        assert not any(name.startswith("x-ratelimit") for name in (await ask(key)).headers)
    (used,) = json.loads("".join((await ask("limited", "/usage", None)).bodies))["usage"]
    assert (used["tenant"], used["adapter"], used["requests"]) == ("limited", "[base]", 4)
    total = first["usage"]["total_tokens"] + second["usage"]["total_tokens"]
    assert used["prompt_tokens"] + used["generated_tokens"] == total
    engine.cancel()
