"""Which adapters may start sequences, and so need a slot.

The adapters whose oldest sequence has waited longest are entitled, as many as have slots and fit into the device's
memory together; but an adapter on the device stays entitled for a bounded turn of further sequences while others wait
for a slot. An adapter that is not entitled starts nothing, so it becomes idle and can be evicted: nobody starves, and
adapters do not swap places for every sequence. Pinned adapters are always entitled; the rest share the remaining slots.
Each tenant's first adapter comes before anyone's second, so a tenant that uses many leaves slots to others.
"""

from collections import Counter
from collections.abc import Collection
from math import inf

from loraplex_router.engine.fairness import Shares
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.engine.queues import Queues
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.sequence import Payer

TURN = 16  # sequences that an adapter may start on its slot while older sequences wait for a slot


class Entitlement:
    def __init__(self, adapters: AdapterPool, queues: Queues, shares: Shares) -> None:
        self._adapters = adapters
        self._queues = queues
        self._shares = shares
        self._contended = False  # an adapter waits for a slot

    def claim(self, entitled: list[Adapter]) -> tuple[list[Adapter], list[Adapter]]:
        """Gives free slots to those that need one. Returns those that got one, and those that still lack one."""
        lacking = [adapter for adapter in self._adapters.pinned if not adapter.waiting] + entitled
        lacking = [adapter for adapter in lacking if adapter.slot is None]
        claimed = [adapter for adapter in lacking if self._adapters.claim_slot(adapter)]
        for adapter in claimed:
            adapter.turn = TURN
        return claimed, [adapter for adapter in lacking if adapter.slot is None]

    def entitled(self, foreground: Collection[Adapter] | None) -> list[Adapter]:
        """The adapters that may start sequences, in the order of their claim to a slot. The base model needs no
        slot. `foreground`: the adapters that come first, if not all are alike."""
        waiting = [adapter for adapter in self._queues.adapters if adapter is not self._adapters.base]
        if not waiting:  # most steps: avoids iterating over thousands of staged adapters
            self._contended = False
            return []
        on_device = self._adapters.on_device()
        self._watch_contention(any(adapter.slot is None for adapter in waiting), on_device)
        holders = [adapter for adapter in on_device if adapter.in_use and not adapter.waiting]
        others = [adapter for adapter in waiting + holders if not adapter.pinned]
        others.sort(key=self._claim_order)
        if self._shares.several:
            others.sort(key=self._count_before(others).__getitem__)
        if foreground is not None:
            others.sort(key=lambda adapter: adapter not in foreground)
        return [adapter for adapter in waiting if adapter.pinned] + self._adapters.fitting(others)

    def started(self, adapter: Adapter) -> bool:
        """The adapter has started a sequence. Returns whether its turn is over."""
        if not (self._contended and adapter.turn):
            return False
        adapter.turn -= 1
        return not adapter.turn

    def _claim_order(self, adapter: Adapter) -> tuple[bool, bool, float]:
        keeps_its_turn = adapter.slot is not None and adapter.turn > 0
        return not keeps_its_turn, keeps_its_turn and not adapter.running, self._queues.oldest(adapter)

    def _count_before(self, adapters: list[Adapter]) -> dict[Adapter, float]:
        """How many adapters its tenant uses, or waits for, that come before it, divided by the tenant's weight. Of
        several tenants, the least."""
        running, before = self._shares.by_adapter(), Counter[Payer]()
        found = {}
        for adapter in adapters:
            payers = self._queues.payers(adapter) | running.get(adapter, set())
            found[adapter] = min((before[payer] / self._shares.weight(payer) for payer in payers), default=inf)
            before.update(payers)
        return found

    def _watch_contention(self, contended: bool, on_device: list[Adapter]) -> None:
        if contended and not self._contended:
            for adapter in on_device:
                adapter.turn = TURN
        self._contended = contended
