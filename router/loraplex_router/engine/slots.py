"""Which slots of the device change hands: to adapters that are entitled, from those that nobody uses or that have to
make way."""

from collections.abc import Callable
from typing import NamedTuple

from loraplex_router.engine.entitlement import Entitlement
from loraplex_router.engine.fairness import Shares
from loraplex_router.engine.places import Places
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.engine.queues import Queues
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.sequence import Sequence


class SlotChanges(NamedTuple):
    claimed: list[Adapter]  # they have a slot now, and are to be loaded
    evicted: list[Adapter]  # they hold a slot until they are unloaded


class Slots:
    """`give_way` preempts a sequence, at the expense of the one that it gives way to; `preempt`, at nobody's."""

    def __init__(
        self,
        adapters: AdapterPool,
        queues: Queues,
        shares: Shares,
        places: Places,
        preempt: Callable[[Sequence], None],
        give_way: Callable[[Sequence, Sequence], None],
    ) -> None:
        self._adapters = adapters
        self._queues = queues
        self._shares = shares
        self._places = places
        self._entitlement = Entitlement(adapters, queues, shares)
        self._startable: list[Adapter] | None = None
        self._preempt = preempt
        self._give_way = give_way

    def begin_plan(self) -> None:
        """From now on, `startable` is asked for another plan."""
        self._startable = None

    def startable(self) -> list[Adapter]:
        """The adapters that may start a sequence now. Who is entitled is found out once for a plan."""
        if self._startable is None:
            self._startable = [adapter for adapter in (self._adapters.base, *self._entitled()) if adapter.ready]
        return [adapter for adapter in self._startable if adapter.waiting]

    def started(self, adapter: Adapter) -> bool:
        """It has started a sequence. Returns whether others may be startable now."""
        if over := self._entitlement.started(adapter):
            self._startable = None
        return over

    def change(self) -> SlotChanges:
        """See Scheduler.change_slots."""
        entitled = self._entitled()
        claimed, lacking = self._entitlement.claim(entitled)
        return SlotChanges(claimed, self._evict_for(lacking, entitled) if lacking else [])

    def _evict_for(self, lacking: list[Adapter], entitled: list[Adapter]) -> list[Adapter]:
        """Background sequences give up slots that others need, and so do adapters that are not entitled any more, for
        tenants that have none: now, or when the plans in flight are complete."""
        evicted = self._adapters.evict(lacking, keep=entitled)
        if self._shares.background:
            foreground = self._in_foreground()
            urgent = [adapter for adapter in lacking if adapter in foreground]
            if self._adapters.lacks(urgent):
                on_device = [s for s in self._places.running if s.background and s.adapter.slot]
                for sequence in [s for s in on_device if s.adapter not in entitled]:
                    self._preempt(sequence)
                evicted += self._adapters.evict(urgent, keep=entitled)
        if self._shares.several and self._takes_slot(lacking, entitled):
            evicted += self._adapters.evict(lacking, keep=entitled)
        return evicted

    def _takes_slot(self, lacking: list[Adapter], entitled: list[Adapter]) -> bool:
        """If a tenant of which nothing runs lacks a slot, an adapter that is not entitled to its slot any more leaves
        it without waiting until its sequences end."""
        heads = (queue[0] for adapter in lacking for queue in self._queues.of(adapter))
        newcomer = next((head for head in heads if not (head.background or self._shares.of(head).total)), None)
        leaving = [a for a in self._adapters.on_device() if a.in_use and not a.pinned and a not in entitled]
        if newcomer is None or not leaving or not self._adapters.lacks([newcomer.adapter]):
            return False
        if all(adapter.running for adapter in leaving):  # else one leaves as soon as the plans in flight are complete
            sequences = [sequence for sequence in self._places.running if sequence.adapter in leaving]
            most = max(sequences, key=lambda s: (len(self._shares.of(s).running), s.number))
            for sequence in [s for s in sequences if s.adapter is most.adapter]:
                self._give_way(sequence, newcomer)
        return True

    def _entitled(self) -> list[Adapter]:
        return self._entitlement.entitled(self._in_foreground() if self._shares.background else None)

    def _in_foreground(self) -> set[Adapter]:
        """The adapters with sequences that are not background ones."""
        running = {sequence.adapter for sequence in self._places.running if not sequence.background}
        return self._queues.in_foreground() | running
