"""A Redis server, or one that speaks its protocol, such as Valkey."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any, TypeAlias

from loraplex_protos.errors import UnavailableError

PREFIX = "{loraplex}:"  # of all keys, which the braces keep together in a cluster: scripts need several at a time
TIMEOUT = 1.0  # seconds, of which some may be spent waiting for a connection
CONNECTIONS = 8  # at most, which are kept

Command: TypeAlias = tuple[str | bytes | int | float, ...]


class RedisServer:
    """`url`: redis://HOST:PORT/DATABASE, rediss:// for TLS, or unix://PATH."""

    def __init__(self, url: str) -> None:
        from redis.asyncio import BlockingConnectionPool, Redis  # routers without it start faster
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        pool = BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS, timeout=None, retry=Retry(NoBackoff(), 0)
        )
        self._redis = Redis.from_pool(pool)
        self.router = secrets.token_hex(8)  # this router's name among those that share the server
        self.fails = False  # whether it did when it was asked last

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """Runs the commands in this order, in one round trip; if there are none, only asks whether the server answers.
        Raises UnavailableError, after which the commands may have been run or not."""
        task = asyncio.current_task()
        assert task is not None
        cancelled = task.cancelling()
        try:
            return await self._run(commands)
        finally:
            if task.cancelling() > cancelled:  # of which the library sometimes makes an error, or nothing at all
                raise asyncio.CancelledError

    async def _run(self, commands: Sequence[Command]) -> list[Any]:
        from redis.exceptions import MovedError, ResponseError

        try:
            async with asyncio.timeout(TIMEOUT):
                pipeline = self._redis.pipeline(transaction=False)
                for command in commands or [("PING",)]:
                    pipeline.execute_command(*command)
                answers = await pipeline.execute(raise_on_error=False)  # the library's messages would have the commands
                for refusal in answers:
                    if isinstance(refusal, ResponseError):
                        # After a failover, this may be a replica, and the name stand for another server.
                        await self._redis.connection_pool.disconnect(inuse_connections=False)
                        raise refusal
        except TimeoutError as error:
            self.fails = True
            raise UnavailableError("the Redis server of --store does not answer") from error
        except MovedError as error:
            self.fails = True
            why = f"is a node of a cluster, of which {error.host}:{error.port} has the keys of loraplex: name that one"
            raise UnavailableError(f"the Redis server of --store {why}, or a server without a cluster") from error
        except Exception as error:  # whatever the library raises must not end the router
            self.fails = True
            raise UnavailableError(f"the Redis server of --store fails: {error}") from error
        self.fails = False
        return answers

    async def aclose(self) -> None:
        await self._redis.aclose()
