"""A tenant: what it may do, how much of it, and what it has in use. Pure policy: no clock, no files, no transport."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
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
    max_requests: Count | None = None  # running or waiting at the same time
    max_adapters: Count | None = None  # that these requests name
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None  # of prompts and answers
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0  # of its share where others wait, too
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


class Tenant:
    """A tenant and what it has in use."""

    def __init__(self, name: str, allowance: Allowance) -> None:
        self.name = name
        self.admin, self.weight = allowance.admin, allowance.weight
        self._allowance = allowance
        self._visits = 0
        self._adapters: Counter[str] = Counter()  # by how many visits each is used
        self._requests, self._tokens = (_Bucket(float(rate or 0)) for rate in self._rates)

    @property
    def _rates(self) -> tuple[int | None, int | None]:
        return self._allowance.requests_per_minute, self._allowance.tokens_per_minute

    def update(self, allowance: Allowance) -> None:
        """Changes what the tenant may do. Its current usage stays counted."""
        self.admin, self.weight = allowance.admin, allowance.weight
        self._allowance = allowance

    def may_use(self, adapter_id: str) -> bool:
        patterns = self._allowance.adapters
        return patterns is None or any(fnmatchcase(adapter_id, normal(pattern)) for pattern in patterns)

    def check_adapter(self, adapter: AdapterReference | MergedReference | None) -> None:
        """Raises ForbiddenError if this tenant may not use the adapter, or one of those to be merged."""
        for reference in parts_of(adapter):
            if not self.may_use(reference.id):
                raise ForbiddenError(f"this API key does not allow adapter {quote(reference.id)}")

    def remaining(self, now: float) -> list[Remaining]:
        """What is left of each rate that the tenant has, at time `now`, in seconds."""
        left = []
        for kind, rate, bucket in zip(("requests", "tokens"), self._rates, (self._requests, self._tokens), strict=True):
            if rate:
                level = bucket.fill(rate, now)
                left.append(Remaining(kind, rate, max(0, int(level)), (rate - level) * 60 / rate))
        return left

    def begin(self, now: float, adapters: Iterable[str] = ()) -> "Visit":
        """Starts a call that names these adapters, at time `now`, in seconds. Raises RateLimitedError if a limit is
        reached."""
        limit = self._allowance.max_requests
        if limit is not None and self._visits >= limit:
            raise RateLimitedError(f"this API key allows {limit} requests at once", BUSY_SECONDS)
        names = frozenset(adapters)
        self._check_adapters(names)
        for kind, rate, bucket in zip(("requests", "tokens"), self._rates, (self._requests, self._tokens), strict=True):
            if rate:
                _check_rate(kind, rate, bucket.fill(rate, now))
        self._requests.level -= 1
        self._visits += 1
        self._adapters.update(names)
        return Visit(self, names)

    def check_tokens(self, now: float) -> None:
        """Raises RateLimitedError if no token is left."""
        if rate := self._allowance.tokens_per_minute:
            _check_rate("tokens", rate, self._tokens.fill(rate, now))

    def spend(self, tokens: int, now: float) -> None:
        if rate := self._allowance.tokens_per_minute:
            self._tokens.fill(rate, now)
            self._tokens.level -= tokens

    def end(self, visit: "Visit") -> None:
        self._visits -= 1
        self._adapters -= Counter(visit.adapters)

    def _check_adapters(self, names: frozenset[str]) -> None:
        limit = self._allowance.max_adapters
        if limit is None:
            return
        if len(names) > limit:
            raise ForbiddenError(f"this API key allows {limit} adapters at once: name fewer in a request")
        if len(names | self._adapters.keys()) > limit:
            raise RateLimitedError(f"this API key allows {limit} adapters at once, and its requests use others", 1.0)


class Visit:
    """A call of a tenant, which counts once for the limits, whatever it consists of. Ends when all its parts have."""

    def __init__(self, tenant: Tenant, adapters: frozenset[str]) -> None:
        self.tenant = tenant
        self.adapters = adapters
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


def _check_rate(kind: str, rate: int, level: float) -> None:
    if level < 1:
        wait = (1 - level) * 60 / rate
        raise RateLimitedError(f"this API key allows {rate} {kind} a minute: try again in {wait:.1f} s", wait)
