"""The limits of tenants over all routers that share a Redis server. One call counts what a router's tenant has in use,
and decides on what it wants to begin.

Each router says what it has in use itself, so nothing drifts; what a router said holds for LEASE_SECONDS, so that those
that have died use nothing. The server's clock counts, so that routers' clocks do not matter.

A call that was not answered may have been run, and may yet be, after later ones. Hence a router says how many tokens it
has spent in all, and up to where it knows them to be counted; the server remembers up to where it has counted them, so
each counts once, however often and in whichever order it is told. What is told late is counted as far as the rate has
not made it good meanwhile: up to what the router itself finds missing. Tokens of a request that never ran are given
back: a router has spent fewer then than are counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from loraplex_router.store.redis_server import PREFIX, RedisServer

LEASE_SECONDS = 5.0

# The policy of access/tenant.py, over routers.
SCRIPT = """
local key, counted, use = KEYS[1], KEYS[2], cjson.decode(ARGV[1])
local now = use.now
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1e6
end

local levels = {}
-- Of all routers, in the order of use.held: those that somebody waits for, and those in the background.
local all = {{visits = 0, adapters = {}, count = 0}, {visits = 0, adapters = {}, count = 0}}
local function missing(of, names)
  local new = 0
  for _, name in ipairs(names) do
    if not of.adapters[name] then new = new + 1 end
  end
  return new
end
local function add(of, visits, names)
  of.visits = of.visits + visits
  for _, name in ipairs(names) do  -- some are there twice
    if not of.adapters[name] then of.adapters[name], of.count = true, of.count + 1 end
  end
end

local stored = redis.call('HGETALL', key)
for place = 1, #stored, 2 do
  local name, value = stored[place], cmsgpack.unpack(stored[place + 1])
  if name == 'requests' or name == 'tokens' then
    levels[name] = value
  elseif value.ends <= now then
    redis.call('HDEL', key, name)
  elseif name ~= use.router then
    for kind, held in ipairs(value.held) do add(all[kind], held.visits, held.adapters) end
  end
end
for kind, held in ipairs(use.held) do add(all[kind], held.visits, held.adapters) end

for kind, rate in pairs(use.rates) do
  local former = levels[kind] or {rate, now}
  levels[kind] = {math.min(rate, former[1] + math.max(0, now - former[2]) * rate / 60), now}
end
local known = tonumber(redis.call('GET', counted))
local new = use.spent - math.max(use.told, known or 0)
local given_back = use.spent < use.told and math.min(0, use.spent - (known or use.told)) or 0
if use.rates.tokens and new > 0 then
  levels.tokens[1] = levels.tokens[1] - math.min(new, use.missing)
elseif use.rates.tokens then
  levels.tokens[1] = math.min(use.rates.tokens, levels.tokens[1] - given_back)
end

local function refusal(of, names)
  if use.max_requests and of.visits >= use.max_requests then return 'visits' end
  local new = missing(of, names)
  if use.max_adapters and new > 0 and of.count + new > use.max_adapters then return 'adapters' end
  for _, kind in ipairs({'requests', 'tokens'}) do
    if use.rates[kind] and levels[kind][1] < 1 then return kind end
  end
  return ''
end
local refusals = {}
for place, begins in ipairs(use.begins) do
  local of, held, names = all[begins.kind], use.held[begins.kind], begins.adapters
  refusals[place] = refusal(of, names)
  if refusals[place] == '' then
    add(of, 1, names)
    held.visits = held.visits + 1
    for _, name in ipairs(names) do table.insert(held.adapters, name) end
    if use.rates.requests then levels.requests[1] = levels.requests[1] - 1 end
  end
end

if use.held[1].visits + use.held[2].visits > 0 then
  redis.call('HSET', key, use.router, cmsgpack.pack({ends = now + use.lease, held = use.held}))
else
  redis.call('HDEL', key, use.router)
end
local keeps, left = use.lease, {}
for kind, rate in pairs(use.rates) do
  local level = levels[kind]
  redis.call('HSET', key, kind, cmsgpack.pack(level))
  keeps = math.max(keeps, (rate - level[1]) * 60 / rate)
  left[kind] = level[1]
end
keeps = math.ceil(keeps * 1000)
redis.call('PEXPIRE', key, keeps)
if new > 0 or given_back < 0 then
  redis.call('SET', counted, use.spent, 'PX', keeps)  -- by then, the router misses none of these
end
return cjson.encode({refusals = refusals, left = left})
"""


@dataclass(frozen=True, slots=True)
class Held:
    """What a router has begun of a tenant, of one kind."""

    visits: int = 0
    adapters: frozenset[str] = frozenset()  # that these name

    def with_begun(self, begun: Sequence[frozenset[str]]) -> "Held":
        """With these visits' adapters."""
        return Held(self.visits + len(begun), self.adapters.union(*begun))

    def encode(self) -> dict[str, Any]:
        return {"visits": self.visits, "adapters": sorted(self.adapters)}


@dataclass(frozen=True, slots=True)
class Begins:
    """A visit that a router wants to begin."""

    adapters: frozenset[str]
    background: bool

    def encode(self) -> dict[str, Any]:
        return {"kind": 1 + self.background, "adapters": sorted(self.adapters)}


@dataclass(frozen=True, slots=True)
class Use:
    """What a router says of a tenant, and asks for it."""

    tenant: str
    max_requests: int | None
    max_adapters: int | None
    rates: dict[str, int]  # a minute
    held: tuple[Held, Held]  # visits that somebody waits for, and those in the background
    spent: int  # tokens in all
    told: int  # of these, those that it knows to be counted
    missing: float  # tokens of a minute's worth, as far as it knows
    begins: tuple[Begins, ...] = ()  # in this order

    def encode(self, router: str, now: float | None) -> bytes:
        said: dict[str, Any] = {
            "router": f"router:{router}",
            "lease": LEASE_SECONDS,
            "rates": self.rates,
            "held": [each.encode() for each in self.held],
            "spent": self.spent,
            "told": self.told,
            "missing": self.missing,
            "begins": [each.encode() for each in self.begins],
        }
        limits = {"max_requests": self.max_requests, "max_adapters": self.max_adapters, "now": now}
        return orjson.dumps(said | {name: limit for name, limit in limits.items() if limit is not None})


@dataclass(frozen=True, slots=True)
class Verdict:
    refusals: tuple[str, ...]  # for each that was to begin: the kind of limit that is reached; empty: it has begun
    left: dict[str, float]  # of each rate


class LimitStore:
    """`clock`: in seconds, instead of the server's."""

    def __init__(self, server: RedisServer, clock: Callable[[], float] | None = None) -> None:
        self._server = server
        self._clock = clock

    async def exchange(self, uses: Sequence[Use]) -> list[Verdict]:
        """A verdict on each use; if there is none, it only asks whether the store answers. Raises UnavailableError."""
        router, now = self._server.router, self._clock and self._clock()
        answers = await self._server.run(
            [("EVAL", SCRIPT, 2, *_keys(use.tenant, router), use.encode(router, now)) for use in uses]
        )
        found = [orjson.loads(answer) for answer, _ in zip(answers, uses, strict=False)]
        return [Verdict(tuple(each["refusals"]), dict(each["left"])) for each in found]


def _keys(tenant: str, router: str) -> tuple[str, str]:
    """What all routers use of a tenant, and up to where this one's tokens are counted."""
    return f"{PREFIX}limits:{tenant}", f"{PREFIX}spent:{router}:{tenant}"
