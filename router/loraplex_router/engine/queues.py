"""The sequences that wait, oldest first: a queue per adapter and payer."""

from bisect import bisect
from collections import deque
from collections.abc import Collection, KeysView, Set
from math import inf

from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.sequence import Payer, Sequence


class Queues:
    def __init__(self) -> None:
        self._queues: dict[Adapter, dict[Payer, deque[Sequence]]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def adapters(self) -> KeysView[Adapter]:
        """Those that sequences wait for."""
        return self._queues.keys()

    def of(self, adapter: Adapter) -> Collection[deque[Sequence]]:
        """The adapter's queues, none of them empty."""
        return self._queues.get(adapter, {}).values()

    def payers(self, adapter: Adapter) -> Set[Payer]:
        """Whose sequences wait for the adapter."""
        return self._queues.get(adapter, {}).keys()

    def of_payer(self, adapter: Adapter, payer: Payer) -> Collection[Sequence]:
        return self._queues.get(adapter, {}).get(payer, ())

    def oldest(self, adapter: Adapter) -> float:
        """The number of the adapter's oldest sequence; infinite if none waits."""
        return min((queue[0].number for queue in self.of(adapter)), default=inf)

    def in_foreground(self) -> set[Adapter]:
        """The adapters with sequences that are not background ones."""
        return {adapter for adapter, queues in self._queues.items() if any(not payer.background for payer in queues)}

    def add(self, sequence: Sequence) -> None:
        """By age: it may have been preempted, or moved from another replica."""
        queue = self._queues.setdefault(sequence.adapter, {}).setdefault(sequence.payer, deque())
        if queue and queue[-1].number > sequence.number:
            queue.insert(bisect(queue, sequence.number, key=lambda waiting: waiting.number), sequence)
        else:
            queue.append(sequence)
        sequence.adapter.waiting += 1
        self._length += 1

    def remove(self, sequence: Sequence) -> None:
        queues = self._queues[sequence.adapter]
        queue = queues[sequence.payer]
        queue.remove(sequence)
        if not queue:
            del queues[sequence.payer]
        if not queues:
            del self._queues[sequence.adapter]
        sequence.adapter.waiting -= 1
        self._length -= 1
