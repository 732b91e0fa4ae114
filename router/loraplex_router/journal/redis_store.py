"""The journal in a Redis server, or one that speaks its protocol, such as Valkey."""

import asyncio
from collections.abc import Awaitable, Collection, Mapping
from typing import TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from loraplex_protos.errors import UnavailableError

PREFIX = "loraplex:stream:"
TIMEOUT = 1.0  # seconds

T = TypeVar("T")


class RedisStore:
    """`url`: redis://HOST:PORT/DATABASE, rediss:// for TLS, or unix://PATH. What was not written to for `seconds` is
    forgotten."""

    shared = True

    def __init__(self, url: str, seconds: float) -> None:
        self._redis = Redis.from_url(url, retry=Retry(NoBackoff(), 0))
        self._milliseconds = round(seconds * 1000)

    async def append(self, parts: Mapping[str, bytes], renewed: Collection[str]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for key, part in parts.items():
            pipeline.append(PREFIX + key, part)
        for key in renewed:
            pipeline.pexpire(PREFIX + key, self._milliseconds)
        await _answered(pipeline.execute())

    async def read(self, key: str) -> bytes | None:
        found = await _answered(self._redis.getex(PREFIX + key, px=self._milliseconds))
        assert not isinstance(found, str)  # nothing is decoded
        return found

    async def aclose(self) -> None:
        await self._redis.aclose()


async def _answered(answer: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(TIMEOUT):
            return await answer
    except TimeoutError as error:
        raise UnavailableError("the store of streams does not answer") from error
    except Exception as error:  # whatever the library raises must not end the router
        raise UnavailableError(f"the store of streams fails: {error}") from error
