"""Adapters on their way into slots of the device and out of them."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine

from loraplex_protos.errors import LoraplexError, OverloadedError, UnavailableError
from loraplex_router.engine.changes import Changes
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.engine.scheduler import Scheduler
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.wire.shards import EngineShards

logger = logging.getLogger(__name__)

SHORTAGE_SECONDS = 10.0  # for which the pool counts on what the device turned out to have, not on its budget


class Transfers:
    """Carries out the scheduler's changes of slots, each in a task of its own."""

    def __init__(
        self,
        scheduler: Scheduler,
        pool: AdapterPool,
        shards: EngineShards,
        changes: Changes,
        wake: Callable[[], None],
        fail_waiting: Callable[[Adapter, LoraplexError], None],
    ) -> None:
        """`wake` tells the engine that there may be something to schedule; `fail_waiting` ends the generations that
        wait for an adapter."""
        self._scheduler = scheduler
        self._pool = pool
        self._shards = shards
        self._changes = changes
        self._wake = wake
        self._fail_waiting = fail_waiting
        self._tasks: dict[Adapter, asyncio.Task[None]] = {}
        self.lost: UnavailableError | None = None  # set if one of them found that the replica is lost

    def begin(self) -> None:
        """Begins what the scheduler wants to change now."""
        changes = self._scheduler.change_slots()
        for adapter in changes.claimed:
            self._tasks[adapter] = asyncio.create_task(self._transfer(adapter, self._load(adapter)))
        for adapter in changes.evicted:
            self._tasks[adapter] = asyncio.create_task(self._transfer(adapter, self._unload(adapter)))

    def cancel(self) -> None:
        """Stops all of them, when the engine ends."""
        for task in self._tasks.values():
            task.cancel()

    async def _transfer(self, adapter: Adapter, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except LoraplexError as error:  # the replica is lost: sequences that wait for the adapter continue elsewhere
            self.lost = error if isinstance(error, UnavailableError) else UnavailableError(error.message)
        else:
            del self._tasks[adapter]
            self.begin()  # those who wait for a slot need not wait for the next plan as well
            self._changes.notify()
        self._wake()

    async def _load(self, adapter: Adapter) -> None:
        assert adapter.slot is not None
        try:
            await self._shards.load(adapter.digest, adapter.slot)
        except UnavailableError:
            raise
        except LoraplexError as error:
            logger.error("adapter %s cannot be loaded into slot %d: %s", adapter.digest, adapter.slot, error)
            await self._unload(adapter)  # other ranks may have loaded it
            if not (isinstance(error, OverloadedError) and self._waits_for_memory(adapter)):
                self._fail_waiting(adapter, error)
                self._pool.unpin(adapter)  # otherwise it would be tried again at once, for ever
        else:
            adapter.ready, adapter.loaded = True, time.monotonic()

    async def _unload(self, adapter: Adapter) -> None:
        assert adapter.slot is not None
        await self._shards.unload(adapter.slot)
        self._pool.release_slot(adapter)

    def _waits_for_memory(self, adapter: Adapter) -> bool:
        """The device had no memory for an adapter, although the pool had: something else takes it. Returns whether the
        adapter can wait until others have left, or the memory is back."""
        asyncio.get_running_loop().call_later(SHORTAGE_SECONDS, self._forget_shortage)
        return self._pool.lower_room(adapter)

    def _forget_shortage(self) -> None:
        self._pool.restore_room()
        self._wake()
