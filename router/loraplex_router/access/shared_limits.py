"""Counts what tenants use over all routers that share a store. While the store fails, each router counts for itself."""

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from loraplex_protos.errors import UnavailableError
from loraplex_router.access.limit_store import LimitStore, Use, Verdict
from loraplex_router.access.tenant import Tenant, Visit

RENEW_SECONDS = 1.0  # between two times that a router says what it has in use: several in a lease

logger = logging.getLogger(__name__)

Held = tuple[int, frozenset[str]]  # the visits of a tenant, and the adapters that they name
NOTHING: Held = (0, frozenset())


@dataclass(frozen=True, slots=True, eq=False)
class _Beginning:
    visit: Visit
    refusal: asyncio.Future[str]  # the kind of limit that is reached; empty: none is


class SharedLimits:
    """A call waits for one answer of the store, at most; those that come together wait for the same one."""

    def __init__(self, store: LimitStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._tenants: dict[Tenant, Held] = {}  # what the store knows of those that have something in use
        self._beginnings: list[_Beginning] = []
        self._news = asyncio.Event()
        self._renewed = 0.0
        self._fails: bool | None = None  # whether the store did when it was asked last; None: it was not

    async def begin(self, tenant: Tenant, now: float, adapters: Iterable[str] = ()) -> Visit:
        """Starts a call: see Tenant.begin."""
        visit = tenant.begin(now, adapters)
        if not tenant.limited:
            return visit
        self._tenants.setdefault(tenant, NOTHING)
        if self._fails:
            return visit
        beginning = _Beginning(visit, asyncio.get_running_loop().create_future())
        self._beginnings.append(beginning)
        self._news.set()
        try:
            if refusal := await beginning.refusal:
                raise tenant.refusal(refusal, self._clock())
        except BaseException:
            visit.end_part()
            raise
        return visit

    def wake(self) -> None:
        """Tells it that a visit may have ended."""
        self._news.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            while True:
                self._news.clear()
                await self.exchange()
                with suppress(TimeoutError):
                    async with asyncio.timeout(RENEW_SECONDS):
                        await self._news.wait()
        finally:
            self._fails = True
            self._answer(self._beginnings, ())

    async def exchange(self) -> None:
        """Tells the store what is in use and what is to begin, as far as it does not know."""
        beginnings, self._beginnings = [each for each in self._beginnings if not each.refusal.done()], []
        now = self._clock()
        renews = self._renewed + RENEW_SECONDS <= now
        of_tenants = defaultdict[Tenant, list[_Beginning]](list)
        for each in beginnings:
            of_tenants[each.visit.tenant].append(each)
        due: dict[Tenant, tuple[Use, list[_Beginning]]] = {}
        for tenant, known in self._tenants.items():
            own = of_tenants[tenant]
            use = _use(tenant, [each.visit for each in own])
            if own or use.spent or (use.visits, use.adapters) != known or (renews and use.visits):
                due[tenant] = use, own
        if not due and self._fails is False:
            return
        try:
            verdicts = await self._store.exchange([use for use, _ in due.values()])
        except UnavailableError as error:
            if not self._fails:
                logger.warning("each router counts limits for itself for now: %s", error.message)
            self._fails = True
            self._tenants = {tenant: NOTHING for tenant in self._tenants if tenant.visits}
            self._answer(beginnings, ())
            return
        if self._fails:
            logger.warning("routers count limits together again")
        self._fails, self._renewed = False, now if renews else self._renewed
        for (tenant, (use, own)), verdict in zip(due.items(), verdicts, strict=True):
            self._take(tenant, use, verdict)
            self._answer(own, verdict.refusals)

    def _take(self, tenant: Tenant, use: Use, verdict: Verdict) -> None:
        begun = [names for names, refusal in zip(use.begins, verdict.refusals, strict=True) if not refusal]
        known = use.visits + len(begun), use.adapters.union(*begun)
        if known == NOTHING and not tenant.visits:
            del self._tenants[tenant]
        else:
            self._tenants[tenant] = known
        later = sum(each.visit.tenant is tenant for each in self._beginnings)
        tenant.adopt(
            {kind: left - later if kind == "requests" else left for kind, left in verdict.left.items()},
            self._clock(),
        )

    def _answer(self, beginnings: Sequence[_Beginning], refusals: Sequence[str]) -> None:
        """Those without a refusal begin."""
        for place, each in enumerate(beginnings):
            if not each.refusal.done():
                each.refusal.set_result(refusals[place] if refusals else "")


def _use(tenant: Tenant, begins: Sequence[Visit]) -> Use:
    adapters = tenant.adapters - Counter(name for visit in begins for name in visit.adapters)
    return Use(
        tenant.name,
        tenant.max_requests,
        tenant.max_adapters,
        tenant.rates,
        tenant.visits - len(begins),
        frozenset(adapters),
        tenant.take_spent(),
        tuple(visit.adapters for visit in begins),
    )
