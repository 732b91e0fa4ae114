"""Limits how much is done at a time, so that one tenant's work leaves room for others'."""

import asyncio
from asyncio import Future
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairSlots:
    """`total` slots for work. A tenant may take as many as it leaves free: half of them if it is alone. So there is
    one for a tenant that has none, while there are few others. Tenants with fewer slots go first. However many wait, a
    slot costs about the same."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._taken = Counter[str]()
        self._waiting: dict[str, OrderedDict[int, Future[None]]] = {}  # by tenant and number, oldest first
        self._ranks: dict[str, tuple[int, int, str]] = {}  # of tenants that wait: slots, its oldest one's number, name
        self._order: list[tuple[int, int, str]] = []  # the ranks, lowest first
        self._number = 0

    @asynccontextmanager
    async def taken(self, tenant: str) -> AsyncIterator[None]:
        """Waits for a slot, and holds it."""
        self._number += 1
        number, came = self._number, asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, OrderedDict())[number] = came
        self._rank(tenant)
        self._hand_out()
        try:
            await came
            yield
        finally:
            if number in self._waiting.get(tenant, ()):
                del self._waiting[tenant][number]
                self._rank(tenant)
            else:
                self._taken[tenant] -= 1
                self._free += 1
                self._rank(tenant)
                self._hand_out()

    def _hand_out(self) -> None:
        while self._order and self._order[0][0] < self._free:
            tenant = self._order[0][-1]
            _, came = self._waiting[tenant].popitem(last=False)
            self._taken[tenant] += 1
            self._free -= 1
            self._rank(tenant)
            if not came.done():  # else it has been cancelled, and is about to give the slot back
                came.set_result(None)

    def _rank(self, tenant: str) -> None:
        """Puts a tenant in its place, or forgets it, after what it waits for or has taken has changed."""
        if former := self._ranks.pop(tenant, None):
            del self._order[bisect_left(self._order, former)]
        if waiting := self._waiting.get(tenant):
            rank = self._ranks[tenant] = self._taken[tenant], next(iter(waiting)), tenant
            insort(self._order, rank)
        else:
            self._waiting.pop(tenant, None)
        if not self._taken[tenant]:
            del self._taken[tenant]
