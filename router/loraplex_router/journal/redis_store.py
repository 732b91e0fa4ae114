"""The journal in a Redis server that several routers share."""

from collections.abc import Collection, Mapping

from loraplex_router.store.redis_server import PREFIX, Command, RedisServer

STREAM = f"{PREFIX}stream:"


def open_streams(router: str) -> str:
    """The key of the streams of a router whose usage is not counted yet."""
    return f"{PREFIX}open-streams:{router}"


class RedisStore:
    """What was not written to for `seconds` is forgotten."""

    shared = True

    def __init__(self, server: RedisServer, seconds: float) -> None:
        self._server = server
        self._milliseconds = round(seconds * 1000)

    async def append(self, parts: Mapping[str, bytes], renewed: Collection[str], begun: Mapping[str, str]) -> None:
        commands: list[Command] = [("APPEND", STREAM + key, part) for key, part in parts.items()]
        commands += [("PEXPIRE", STREAM + key, self._milliseconds) for key in renewed]
        if begun:
            commands.append(("SADD", open_streams(self._server.router), *begun))
        await self._server.run(commands)

    async def read(self, key: str) -> bytes | None:
        found: bytes | None
        (found,) = await self._server.run([("GETEX", STREAM + key, "PX", self._milliseconds)])
        return found
