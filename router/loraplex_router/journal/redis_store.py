"""The journal in a Redis server that several routers share."""

from collections.abc import Collection, Mapping

from loraplex_router.store.redis_server import PREFIX, Command, RedisServer

STREAM = f"{PREFIX}stream:"

# KEYS: of streams. ARGV: milliseconds; for each stream, its record, if it may be new, and what is added to it.
# Returns the places of those that have neither anything nor a record.
APPEND = """
local lost = {}
for place, key in ipairs(KEYS) do
  local record, part = ARGV[2 * place], ARGV[2 * place + 1]
  if redis.call('EXISTS', key) == 1 then
    redis.call('APPEND', key, part)
    redis.call('PEXPIRE', key, ARGV[1])
  elseif record ~= '' then
    redis.call('SET', key, record .. part, 'PX', ARGV[1])
  else
    table.insert(lost, place)
  end
end
return lost
"""


def open_streams(router: str) -> str:
    """The key of the streams of a router whose usage is not counted yet."""
    return f"{PREFIX}open-streams:{router}"


class RedisStore:
    """What was not written to for `seconds` is forgotten."""

    shared = True

    def __init__(self, server: RedisServer, seconds: float) -> None:
        self._server = server
        self._milliseconds = round(seconds * 1000)

    async def append(
        self, parts: Mapping[str, bytes], records: Mapping[str, bytes], begun: Mapping[str, str]
    ) -> Collection[str]:
        keys = list(parts)
        said = [each for key, part in parts.items() for each in (records.get(key, b""), part)]
        commands: list[Command] = [
            ("EVAL", APPEND, len(keys), *(STREAM + key for key in keys), self._milliseconds, *said)
        ]
        if begun:
            commands.append(("SADD", open_streams(self._server.router), *begun))
        lost, *_ = await self._server.run(commands)
        return [keys[place - 1] for place in lost]

    async def read(self, key: str) -> bytes | None:
        found: bytes | None
        (found,) = await self._server.run([("GETEX", STREAM + key, "PX", self._milliseconds)])
        return found
