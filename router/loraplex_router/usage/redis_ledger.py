"""The ledger in a Redis server that several routers share. It also knows which routers live, and what those that have
died were computing."""

import asyncio
import time
from collections.abc import Sequence
from datetime import date

import orjson

from loraplex_router.journal.redis_store import STREAM, open_streams
from loraplex_router.store.redis_server import PREFIX, Command, RedisServer
from loraplex_router.usage.event import Counted, Used
from loraplex_router.usage.ledger import MOST_ADAPTERS, MOST_DAYS, Entry, Lost, Running, Totals, add_up, today
from loraplex_router.vocabulary.adapter import OTHER

LEASE_SECONDS = 5.0  # without a sign of life, after which a router has died
STREAM_SECONDS = 86400  # how long it is known what is counted of a stream
ENTRY_SECONDS = 600  # the same of others: until this router knows that they are counted
RUNNING_SECONDS = 300  # how long is known what a dead router computed: less than ENTRY_SECONDS, so it is counted once

ROUTERS = f"{PREFIX}routers"
SINCE = f"{PREFIX}usage-since"

# KEYS: the account, the day's totals. ARGV: the entry; for the adapter and for other ones, the totals' names.
# Returns the event's id, and what it adds. An account has the events that may not be told yet.
SETTLE = """
local entry = cjson.decode(ARGV[1])
local stored = redis.call('GET', KEYS[1])
local account = stored and cmsgpack.unpack(stored) or {generated = 0}
account.untold = account.untold or {}  -- earlier versions had none
local event = account.untold[entry.name]
if event then return cjson.encode(event) end  -- it asks again

local new = entry.used
if stored then new = {0, 0, 0, math.max(0, entry.used[4] - account.generated)} end
event = {id = entry.name, router = entry.router, used = {unpack(new)}}
for name, left in pairs(account.untold) do
  if entry.lost and left.router == entry.router then
    if new[4] == 0 then event.id = left.id end
    for place, value in ipairs(left.used) do event.used[place] = event.used[place] + value end
    account.untold[name] = nil
  end
end
account.generated = math.max(account.generated, entry.used[4])
account.untold[entry.name] = event
redis.call('SET', KEYS[1], cmsgpack.pack(account), 'EX', entry.keeps)

local names = entry.names
if redis.call('HEXISTS', KEYS[2], names[1]) == 0 and redis.call('HLEN', KEYS[2]) >= entry.most then
  names = entry.others
end
for place, name in ipairs(names) do redis.call('HINCRBY', KEYS[2], name, new[place]) end
redis.call('EXPIRE', KEYS[2], entry.days * 86400)
return cjson.encode(event)
"""

# KEYS: the account. ARGV: the name of an entry whose event has been told.
TOLD = """
local stored = redis.call('GET', KEYS[1])
if stored then
  local account = cmsgpack.unpack(stored)
  if account.untold then account.untold[ARGV[1]] = nil end
  redis.call('SET', KEYS[1], cmsgpack.pack(account), 'KEEPTTL')
end
"""

# Says that a router lives, and returns those that no longer do, each to one router at a time.
LIVE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
redis.call('ZADD', KEYS[1], string.format('%.3f', now + ARGV[2]), ARGV[1])
local dead = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.3f', now))
for _, router in ipairs(dead) do redis.call('ZADD', KEYS[1], string.format('%.3f', now + ARGV[2]), router) end
return dead
"""


class RedisLedger:
    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._running: frozenset[str] = frozenset()  # the accounts of what runs here, as others know it

    async def settle(self, entries: Sequence[Entry]) -> list[Counted]:
        commands: list[Command] = [("SET", SINCE, time.time(), "NX")]
        commands += [self._settle(entry, entry.used) for entry in entries if entry.used]
        answers = iter((await self._server.run(commands))[1:])
        events = [orjson.loads(next(answers)) if entry.used else None for entry in entries]
        return [
            Counted(event["id"], Used(*event["used"])) if event else Counted(self._name(entry), Used())
            for entry, event in zip(entries, events, strict=True)
        ]

    async def told(self, entries: Sequence[Entry]) -> None:
        commands: list[Command] = []
        for entry in entries:
            if entry.stream or entry.router or entry.account in self._running:  # of others, nobody else knows
                commands.append(("EVAL", TOLD, 1, _account(entry), self._name(entry)))
            if entry.stream:
                commands.append(("SREM", open_streams(self._router(entry)), entry.stream))
            elif entry.router:
                commands.append(("HDEL", _running(entry.router), entry.account))
        if commands:
            await self._server.run(commands)

    def _name(self, entry: Entry) -> str:
        return f"{self._server.router}.{entry.number}"

    def _router(self, entry: Entry) -> str:
        """Whose stream it is."""
        return entry.router or self._server.router

    def _settle(self, entry: Entry, used: Used) -> Command:
        said = {
            "name": self._name(entry),
            "router": self._router(entry),
            "lost": bool(entry.router),
            "used": used.values,
            "names": _names(entry.tenant, entry.adapter),
            "others": _names(entry.tenant, OTHER),
            "keeps": STREAM_SECONDS if entry.stream else ENTRY_SECONDS,
            "most": MOST_ADAPTERS * len(used.values),
            "days": MOST_DAYS,
        }
        return "EVAL", SETTLE, 2, _account(entry), _day(today()), orjson.dumps(said)

    async def totals(self, days: Sequence[date]) -> Totals:
        found = await self._server.run([("HGETALL", _day(day)) for day in days])
        return await asyncio.to_thread(lambda: add_up([_read(each) for each, _ in zip(found, days, strict=False)]))

    async def since(self) -> float:
        (since,) = await self._server.run([("GET", SINCE)])
        return float(since) if since else time.time()

    async def lost(self, running: Running) -> list[Lost]:
        now, key = running(), _running(self._server.router)
        commands: list[Command] = [("EVAL", LIVE, 1, ROUTERS, self._server.router, LEASE_SECONDS)]
        commands += [("HSET", key, account, said) for account, said in now.items()]
        commands.append(("EXPIRE", key, RUNNING_SECONDS))
        if over := self._running - now.keys():
            commands.append(("HDEL", key, *over))
        self._running |= now.keys()
        dead, *_ = await self._server.run(commands)
        self._running = frozenset(now)
        return [lost for router in dead for lost in await self._left_by(router.decode())]

    async def _left_by(self, router: str) -> list[Lost]:
        streams, running = await self._server.run([("SMEMBERS", open_streams(router)), ("HGETALL", _running(router))])
        if not streams and not running:
            await self._server.run([("ZREM", ROUTERS, router)])
            return []
        data = await self._server.run([("GET", STREAM + key.decode()) for key in streams]) if streams else []
        left = [Lost(router, each or b"", stream=key.decode()) for key, each in zip(streams, data, strict=True)]
        return left + [Lost(router, each, account=key.decode()) for key, each in running.items()]

    async def drop(self, lost: Lost) -> None:
        if lost.stream:
            await self._server.run([("SREM", open_streams(lost.router), lost.stream)])
        else:
            await self._server.run([("HDEL", _running(lost.router), lost.account)])


def _running(router: str) -> str:
    """The key of what runs on a router and is not in the journal, by account."""
    return f"{PREFIX}running:{router}"


def _account(entry: Entry) -> str:
    return f"{PREFIX}account:{entry.account}"


def _day(day: date) -> str:
    return f"{PREFIX}usage:{day.isoformat()}"


def _names(tenant: str, adapter: str) -> list[str]:
    return [orjson.dumps([tenant, adapter, place]).decode() for place in range(len(Used().values))]


def _read(stored: dict[bytes, bytes]) -> Totals:
    found: dict[tuple[str, str], list[int]] = {}
    for name, value in stored.items():
        tenant, adapter, place = orjson.loads(name)
        found.setdefault((tenant, adapter), [0] * len(Used().values))[place] = int(value)
    return {key: Used(*values) for key, values in found.items()}
