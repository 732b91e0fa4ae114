"""Whose turn it is to start, of the sequences that wait."""

import heapq
from collections.abc import Collection, Iterable
from typing import NamedTuple

from loraplex_router.engine.fairness import Shares
from loraplex_router.engine.places import Places
from loraplex_router.engine.queues import Queues
from loraplex_router.engine.slots import Slots
from loraplex_router.vocabulary.sequence import Payer, Sequence


class Rank(NamedTuple):
    """The sort key of queues: lower goes first."""

    background: bool
    exceeds: bool
    served: float
    places: float
    running: int
    number: int  # of the queue's head: no two have the same


class Turns:
    """Ranks the queues once for a plan. While sequences start, ranks only rise, so that of the first queue alone is
    found out again; whoever lowers one calls `begin_anew`."""

    def __init__(self, queues: Queues, shares: Shares, places: Places, slots: Slots) -> None:
        self._queues = queues
        self._shares = shares
        self._places = places
        self._slots = slots
        self._ranked: list[tuple[Rank, Collection[Sequence]]] | None = None  # a heap
        self._passed: Payer | None = None  # when it was made

    def begin_anew(self) -> None:
        """A plan begins, a sequence waits or has left its place, or other adapters are startable."""
        self._ranked = None

    def next(self, passed: Payer | None = None) -> Sequence | None:
        """If somebody was passed over, only others of whom nothing runs are next, with new sequences."""
        if not len(self._queues):
            return None
        if self._ranked is None or passed != self._passed:
            queues = [queue for adapter in self._slots.startable() for queue in self._queues.of(adapter)]
            heads = [(head, queue) for queue in queues if (head := self._head(queue, passed))]
            self._ranked, self._passed = [(self._rank(head), queue) for head, queue in heads], passed
            heapq.heapify(self._ranked)
        while ranked := self._ranked:
            former, queue = ranked[0]
            if (head := self._head(queue, passed)) is None:
                heapq.heappop(ranked)
            elif (rank := self._rank(head)) == former:
                return head
            else:
                heapq.heapreplace(ranked, (rank, queue))
        return None

    def _head(self, queue: Collection[Sequence], passed: Payer | None) -> Sequence | None:
        """The sequence that is next in the queue, if it may start."""
        head = next((sequence for sequence in queue if not sequence.suspect), None)
        if head is None or head.in_flight:  # preempted, and its last sample not known yet
            return None
        if passed and (head.payer == passed or head.attempts or self._shares.of(head).total):
            return None
        return head

    def next_suspect(self, suspects: Iterable[Sequence]) -> Sequence | None:
        """The youngest of the suspects that wait, if it can start."""
        startable = self._slots.startable()
        waiting = [s for s in suspects if s.row is None and s.adapter in startable and not s.in_flight]
        youngest = max(waiting, key=lambda suspect: suspect.number, default=None)
        return youngest if youngest is not None and self._places.has_room(youngest) else None

    def _rank(self, head: Sequence) -> Rank:
        share, exceeds = self._shares.of(head), self._places.would_exceed_share(head)
        return Rank(head.background, exceeds, *share.order, share.running[head.adapter], head.number)
