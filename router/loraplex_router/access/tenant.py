"""A tenant: what it may do, how much of it, and what it has in use. Pure policy: no clock, no files, no transport."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from loraplex_protos.adapter_names import normal
from loraplex_protos.errors import ForbiddenError, RateLimitedError, quote
from loraplex_router.vocabulary.references import AdapterReference, MergedReference, parts_of

BUSY_SECONDS = 1.0  # when to try again if a tenant's requests are all running: nobody knows when one ends, so soon

Count = Annotated[int, Field(ge=1)]


class Allowance(BaseModel):
    """What a tenant may do. Absent fields set no limit."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    adapters: list[str] | None = None  # shell patterns, but * also matches /; the base model is open to all
    # Running or waiting at the same time, and as many in the background: these do not keep others from being admitted.
    max_requests: Count | None = None
    max_adapters: Count | None = None  # that these requests name, and likewise
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None  # of prompts and answers
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0  # of its share where others wait, too
    kv_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of a replica's KV blocks, while others want them
    admin: bool = False  # may load and unload adapters, and cancel others' requests


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left of a rate."""

    kind: str  # "requests" or "tokens"
    limit: int  # a minute
    count: int
    seconds: float  # until nothing of it is used


@dataclass(slots=True)
class _Bucket:
    """One minute's worth at most; fills up again evenly. May be in debt, which delays later requests."""

    level: float = 0.0
    filled_at: float = 0.0

    def fill(self, rate: int, now: float) -> float:
        self.level = min(float(rate), self.level + (now - self.filled_at) * rate / 60)
        self.filled_at = now
        return self.level


@dataclass(slots=True)
class Visits:
    """Those that run or wait."""

    count: int = 0
    adapters: Counter[str] = field(default_factory=Counter)  # by how many visits each is used


class Tenant:
    """A tenant and what it has in use."""

    def __init__(self, name: str, allowance: Allowance) -> None:
        self.name = name
        self.update(allowance)
        self.visits = {False: Visits(), True: Visits()}  # in the background: True
        self._buckets = {"requests": _Bucket(), "tokens": _Bucket()}
        for kind, rate in self.rates.items():
            self._buckets[kind].level = float(rate)
        self.spent = 0  # tokens in all, while it had a limit of them
        self.told = 0  # of these, those that other routers know of

    def update(self, allowance: Allowance) -> None:
        """Changes what the tenant may do. Its current usage stays counted."""
        self.admin, self.weight, self.kv_share = allowance.admin, allowance.weight, allowance.kv_share
        self.max_requests, self.max_adapters = allowance.max_requests, allowance.max_adapters
        rates = {"requests": allowance.requests_per_minute, "tokens": allowance.tokens_per_minute}
        self.rates = {kind: rate for kind, rate in rates.items() if rate}
        patterns = allowance.adapters
        self._patterns = None if patterns is None else tuple(map(normal, patterns))

    @property
    def limited(self) -> bool:
        return bool(self.rates) or self.max_requests is not None or self.max_adapters is not None

    def may_use(self, adapter_id: str) -> bool:
        """The adapter with this name, or all that were merged."""
        patterns = self._patterns
        if patterns is None:
            return True
        return all(any(fnmatchcase(id, pattern) for pattern in patterns) for id in adapter_id.split(","))

    def may_see(self, adapter_id: str, known_to: Collection[str] | None) -> bool:
        """Whether lists and suggestions show it this adapter. `known_to`: the tenants that alone know of it; None: all
        do."""
        return self.may_use(adapter_id) and (known_to is None or self.admin or self.name in known_to)

    def may_know(self, origin_id: str) -> bool:
        """Whether it is told what a name of the registry stands for."""
        return self.admin or self.may_use(origin_id)

    def check_adapter(self, adapter: AdapterReference | MergedReference | None) -> None:
        """Raises ForbiddenError if this tenant may not use the adapter, or one of those to be merged."""
        for reference in parts_of(adapter):
            if not self.may_use(reference.id):
                # As the caller wrote it, so that nothing is said about which names there are.
                error = ForbiddenError(f"this API key does not allow adapter {quote(reference.asked or reference.id)}")
                error.field = "adapter.id"
                raise error

    def remaining(self, now: float) -> list[Remaining]:
        """What is left of each rate that the tenant has, at time `now`, in seconds."""
        left = []
        for kind, rate in self.rates.items():
            level = self._buckets[kind].fill(rate, now)
            left.append(Remaining(kind, rate, max(0, int(level)), (rate - level) * 60 / rate))
        return left

    def begin(self, now: float, adapters: Iterable[str] = (), background: bool = False) -> "Visit":
        """Starts a call that names these adapters, at time `now`, in seconds. Raises RateLimitedError if a limit is
        reached."""
        visits = self.visits[background]
        if self.max_requests is not None and visits.count >= self.max_requests:
            raise self.refusal("visits", now)
        names = frozenset(adapters)
        self._check_adapters(names, visits, now)
        for kind in self.rates:
            self._check_rate(kind, now)
        self._buckets["requests"].level -= 1
        visits.count += 1
        visits.adapters.update(names)
        return Visit(self, names, background)

    def refusal(self, kind: str, now: float) -> RateLimitedError:
        """What a call gets that reaches a limit: "visits", "adapters", "requests" or "tokens"."""
        if kind == "visits":
            return RateLimitedError(f"this API key allows {self.max_requests} requests at once", BUSY_SECONDS)
        if kind == "adapters":
            limit = f"{self.max_adapters} adapters at once, and its requests use others"
            return RateLimitedError(f"this API key allows {limit}", BUSY_SECONDS)
        rate = self.rates[kind]
        wait = max(0.0, 1 - self._buckets[kind].fill(rate, now)) * 60 / rate
        return RateLimitedError(f"this API key allows {rate} {kind} a minute: try again in {wait:.1f} s", wait)

    def check_tokens(self, now: float) -> None:
        """Raises RateLimitedError if no token is left."""
        if "tokens" in self.rates:
            self._check_rate("tokens", now)

    def spend(self, tokens: int, now: float) -> None:
        if rate := self.rates.get("tokens"):
            self._buckets["tokens"].fill(rate, now)
            self._buckets["tokens"].level -= tokens
            self.spent += tokens

    def missing(self, now: float) -> float:
        """The tokens that are missing from a minute's worth."""
        rate = self.rates.get("tokens")
        return rate - self._buckets["tokens"].fill(rate, now) if rate else 0.0

    def adopt(self, left: Mapping[str, float], told: int, now: float) -> None:
        """What other routers, too, leave of each rate. They know of the first `told` tokens that this one has spent:
        the rest comes off that."""
        self.told = told
        for kind, level in left.items():
            bucket = self._buckets[kind]
            bucket.level, bucket.filled_at = level - (self.spent - told if kind == "tokens" else 0), now

    def end(self, visit: "Visit") -> None:
        visits = self.visits[visit.background]
        visits.count -= 1
        visits.adapters -= Counter(visit.adapters)

    def _check_adapters(self, names: frozenset[str], visits: Visits, now: float) -> None:
        limit = self.max_adapters
        if limit is None:
            return
        if len(names) > limit:
            raise ForbiddenError(f"this API key allows {limit} adapters at once: name fewer in a request")
        if len(names | visits.adapters.keys()) > limit:
            raise self.refusal("adapters", now)

    def _check_rate(self, kind: str, now: float) -> None:
        if self._buckets[kind].fill(self.rates[kind], now) < 1:
            raise self.refusal(kind, now)


class Visit:
    """A call of a tenant, which counts once for the limits, whatever it consists of. Ends when all its parts have."""

    def __init__(self, tenant: Tenant, adapters: frozenset[str], background: bool) -> None:
        self.tenant = tenant
        self.adapters = adapters
        self.background = background
        self._parts = 1
        self._spends = False

    def begin_part(self) -> None:
        self._parts += 1

    def spend(self, tokens: int, now: float) -> None:
        """Counts tokens. Raises RateLimitedError if they are the first of the call and none are left: others may have
        spent them since it began."""
        if not self._spends:
            self.tenant.check_tokens(now)
        self._spends = True
        self.tenant.spend(tokens, now)

    def end_part(self) -> None:
        self._parts -= 1
        if not self._parts:
            self.tenant.end(self)
