"""Limits how much is done at a time, so that one tenant's work leaves room for others'."""

import asyncio
from asyncio import Future
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairSlots:
    """`total` slots for work. A tenant may take as many as it leaves free: half of them if it is alone. So there is
    one for a tenant that has none, while there are few others."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._taken = Counter[str]()
        self._waiting: list[tuple[str, Future[None]]] = []  # oldest first

    @asynccontextmanager
    async def taken(self, tenant: str) -> AsyncIterator[None]:
        """Waits for a slot, and holds it."""
        waiting = tenant, asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self._hand_out()
        try:
            await waiting[1]
            yield
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            else:
                self._taken[tenant] -= 1
                self._free += 1
                self._hand_out()

    def _hand_out(self) -> None:
        for waiting in list(self._waiting) if self._free else ():
            tenant, came = waiting
            if self._taken[tenant] < self._free and not came.cancelled():
                self._waiting.remove(waiting)
                self._taken[tenant] += 1
                self._free -= 1
                came.set_result(None)
        self._taken += Counter()  # without those that have none
