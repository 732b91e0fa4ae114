"""The limits of tenants over all routers that share a Redis server. One call counts what a router's tenant has in use,
and decides on what it wants to begin.

Each router says what it has in use itself, so nothing drifts; what a router said holds for LEASE_SECONDS, so that those
that have died use nothing. The server's clock counts, so that routers' clocks do not matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from loraplex_router.store.redis_server import PREFIX, RedisServer

LEASE_SECONDS = 5.0

# The policy of access/tenant.py, over routers.
SCRIPT = """
local key, use = KEYS[1], cjson.decode(ARGV[1])
local now = use.now
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1e6
end

local levels, visits, adapters, count = {}, use.visits, {}, 0
local function missing(names)
  local new = 0
  for _, name in ipairs(names) do
    if not adapters[name] then new = new + 1 end
  end
  return new
end
local function add(names)
  count = count + missing(names)
  for _, name in ipairs(names) do adapters[name] = true end
end

local stored = redis.call('HGETALL', key)
for place = 1, #stored, 2 do
  local name, value = stored[place], cmsgpack.unpack(stored[place + 1])
  if name == 'requests' or name == 'tokens' then
    levels[name] = value
  elseif value.ends <= now then
    redis.call('HDEL', key, name)
  elseif name ~= use.router then
    visits = visits + value.visits
    add(value.adapters)
  end
end
add(use.adapters)

for kind, rate in pairs(use.rates) do
  local former = levels[kind] or {rate, now}
  levels[kind] = {math.min(rate, former[1] + math.max(0, now - former[2]) * rate / 60), now}
end
if use.rates.tokens then levels.tokens[1] = levels.tokens[1] - use.spent end

local function refusal(names)
  if use.max_requests and visits >= use.max_requests then return 'visits' end
  local new = missing(names)
  if use.max_adapters and new > 0 and count + new > use.max_adapters then return 'adapters' end
  for _, kind in ipairs({'requests', 'tokens'}) do
    if use.rates[kind] and levels[kind][1] < 1 then return kind end
  end
  return ''
end
local refusals = {}
for place, names in ipairs(use.begins) do
  refusals[place] = refusal(names)
  if refusals[place] == '' then
    visits, use.visits = visits + 1, use.visits + 1
    add(names)
    for _, name in ipairs(names) do table.insert(use.adapters, name) end
    if use.rates.requests then levels.requests[1] = levels.requests[1] - 1 end
  end
end

if use.visits > 0 then
  local own = {ends = now + use.lease, visits = use.visits, adapters = use.adapters}
  redis.call('HSET', key, use.router, cmsgpack.pack(own))
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
redis.call('PEXPIRE', key, math.ceil(keeps * 1000))
return cjson.encode({refusals = refusals, left = left})
"""


@dataclass(frozen=True, slots=True)
class Use:
    """What a router says of a tenant, and asks for it."""

    tenant: str
    max_requests: int | None
    max_adapters: int | None
    rates: dict[str, int]  # a minute
    visits: int  # that it has begun
    adapters: frozenset[str]  # that these name
    spent: int  # tokens since it said so last
    begins: tuple[frozenset[str], ...] = ()  # the adapters of each visit that it wants to begin, in this order

    def encode(self, router: str, now: float | None) -> bytes:
        said: dict[str, Any] = {
            "router": f"router:{router}",
            "lease": LEASE_SECONDS,
            "rates": self.rates,
            "visits": self.visits,
            "adapters": sorted(self.adapters),
            "spent": self.spent,
            "begins": [sorted(names) for names in self.begins],
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
            [("EVAL", SCRIPT, 1, f"{PREFIX}limits:{use.tenant}", use.encode(router, now)) for use in uses]
        )
        found = [orjson.loads(answer) for answer, _ in zip(answers, uses, strict=False)]
        return [Verdict(tuple(each["refusals"]), dict(each["left"])) for each in found]
