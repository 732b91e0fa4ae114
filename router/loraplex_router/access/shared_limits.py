"""Counts what tenants use over all routers that share a store. While the store fails, each router counts for itself."""

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from loraplex_protos.errors import UnavailableError
from loraplex_router.access.limit_store import Begins, Held, LimitStore, Use, Verdict
from loraplex_router.access.tenant import Tenant, Visit

RENEW_SECONDS = 1.0  # between two times that a router says what it has in use: several in a lease

logger = logging.getLogger(__name__)

NOTHING = Held(), Held()


@dataclass(frozen=True, slots=True, eq=False)
class _Beginning:
    visit: Visit
    refusal: asyncio.Future[str]  # the kind of limit that is reached; empty: none is


class SharedLimits:
    """A call waits for one answer of the store, at most; those that come together wait for the same one."""

    def __init__(self, store: LimitStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._tenants: dict[Tenant, tuple[Held, Held]] = {}  # what the store knows of those that it must hear of
        self._beginnings: list[_Beginning] = []
        self._news = asyncio.Event()
        self._renewed = 0.0
        self._fails: bool | None = None  # whether the store did when it was asked last; None: it was not

    async def begin(self, tenant: Tenant, now: float, adapters: Iterable[str] = (), background: bool = False) -> Visit:
        """Starts a call: see Tenant.begin."""
        visit = tenant.begin(now, adapters, background)
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
                    async with asyncio.timeout(RENEW_SECONDS):  # a store that fails is left alone so long
                        await (asyncio.Event() if self._fails else self._news).wait()
        finally:
            self._fails = True
            self._answer(self._beginnings, ())

    async def exchange(self) -> None:
        """Tells the store what is in use and what is to begin, as far as it does not know."""
        beginnings, self._beginnings = [each for each in self._beginnings if not each.refusal.done()], []
        try:
            await self._exchange(beginnings)
        finally:
            self._answer(beginnings, ())  # whatever happened, nobody waits any longer

    async def _exchange(self, beginnings: Sequence[_Beginning]) -> None:
        now = self._clock()
        renews = self._renewed + RENEW_SECONDS <= now
        of_tenants = defaultdict[Tenant, list[_Beginning]](list)
        for each in beginnings:
            of_tenants[each.visit.tenant].append(each)
        due: dict[Tenant, tuple[Use, list[_Beginning]]] = {}
        for tenant, known in self._tenants.items():
            own = of_tenants[tenant]
            use = _use(tenant, [each.visit for each in own], now)
            if own or use.spent != use.told or use.held != known or (renews and use.held != NOTHING):
                due[tenant] = use, own
        if not due and self._fails is False:
            return
        try:
            verdicts = await self._store.exchange([use for use, _ in due.values()])
        except UnavailableError as error:
            if not self._fails:
                logger.warning("each router counts limits for itself for now: %s", error.message)
            self._fails = True
            self._tenants = {tenant: NOTHING for tenant in self._tenants if _has_news(tenant, NOTHING)}
            self._answer(self._beginnings, ())  # those that came meanwhile
            return
        if self._fails:
            logger.warning("routers count limits together again")
        self._fails, self._renewed = False, now if renews else self._renewed
        for (tenant, (use, own)), verdict in zip(due.items(), verdicts, strict=True):
            self._take(tenant, use, verdict)
            self._answer(own, verdict.refusals)

    def _take(self, tenant: Tenant, use: Use, verdict: Verdict) -> None:
        begun = [each for each, refusal in zip(use.begins, verdict.refusals, strict=True) if not refusal]
        interactive, background = use.held
        known = (
            interactive.with_begun([each.adapters for each in begun if not each.background]),
            background.with_begun([each.adapters for each in begun if each.background]),
        )
        later = sum(each.visit.tenant is tenant for each in self._beginnings)
        tenant.adopt(
            {kind: left - later if kind == "requests" else left for kind, left in verdict.left.items()},
            use.spent,
            self._clock(),
        )
        if known != NOTHING or _has_news(tenant, known):
            self._tenants[tenant] = known
        else:
            del self._tenants[tenant]

    def _answer(self, beginnings: Sequence[_Beginning], refusals: Sequence[str]) -> None:
        """Those without a refusal begin, if they have no answer yet."""
        for place, each in enumerate(beginnings):
            if not each.refusal.done():
                each.refusal.set_result(refusals[place] if refusals else "")


def _has_news(tenant: Tenant, known: tuple[Held, Held]) -> bool:
    """For a store that knows this of what it has in use."""
    return _held(tenant, ()) != known or tenant.spent != tenant.told


def _use(tenant: Tenant, begins: Sequence[Visit], now: float) -> Use:
    return Use(
        tenant.name,
        tenant.max_requests,
        tenant.max_adapters,
        tenant.rates,
        _held(tenant, begins),
        tenant.spent,
        tenant.told,
        tenant.missing(now),
        tuple(Begins(visit.adapters, visit.background) for visit in begins),
    )


def _held(tenant: Tenant, without: Sequence[Visit]) -> tuple[Held, Held]:
    return _held_of(tenant, without, False), _held_of(tenant, without, True)


def _held_of(tenant: Tenant, without: Sequence[Visit], background: bool) -> Held:
    left_out = [visit for visit in without if visit.background is background]
    visits = tenant.visits[background]
    adapters = visits.adapters - Counter(name for visit in left_out for name in visit.adapters)
    return Held(visits.count - len(left_out), frozenset(adapters))
