"""Whose turn it is to start, of the sequences that wait."""

from collections.abc import Iterable

from loraplex_router.engine.fairness import Shares
from loraplex_router.engine.places import Places
from loraplex_router.engine.queues import Queues
from loraplex_router.engine.slots import Slots
from loraplex_router.vocabulary.sequence import Payer, Sequence


class Turns:
    def __init__(self, queues: Queues, shares: Shares, places: Places, slots: Slots) -> None:
        self._queues = queues
        self._shares = shares
        self._places = places
        self._slots = slots

    def next(self, passed: Payer | None = None) -> Sequence | None:
        """If somebody was passed over, only others of whom nothing runs are next, with new sequences."""
        if not len(self._queues):
            return None
        queues = [queue for adapter in self._slots.startable() for queue in self._queues.of(adapter)]
        heads = [head for queue in queues if (head := next((s for s in queue if not s.suspect), None))]
        heads = [head for head in heads if not head.in_flight]  # preempted, and its last sample not known yet
        if passed:
            heads = [h for h in heads if h.payer != passed and not (h.attempts or self._shares.of(h).total)]
        return min(heads, key=self._turn, default=None)

    def next_suspect(self, suspects: Iterable[Sequence]) -> Sequence | None:
        """The youngest of the suspects that wait, if it can start."""
        startable = self._slots.startable()
        waiting = [s for s in suspects if s.row is None and s.adapter in startable and not s.in_flight]
        youngest = max(waiting, key=lambda suspect: suspect.number, default=None)
        return youngest if youngest is not None and self._places.has_room(youngest) else None

    def _turn(self, head: Sequence) -> tuple[bool, bool, float, float, int, int]:
        """The sort key: lower goes first."""
        share, exceeds = self._shares.of(head), self._places.would_exceed_share(head)
        return head.background, exceeds, *share.order, share.running[head.adapter], head.number
