"""Who goes first: fair shares of service among tenants and, within a tenant, among its adapters. Pure policy.

Tenants: the virtual token counter of Sheng et al. (OSDI 2024). Each tenant has a counter of the service that it
received: tokens divided by its weight. The tenant with the lowest counter goes first. A tenant that returns is raised
to the lowest counter of the active tenants, so that nobody saves up service. Within a tenant, the adapter with the
fewest running sequences goes first, with its oldest sequence.

The paper's server only decides admission: a newcomer waits until a running sequence ends. Here it need not: if all
rows or blocks are taken, a tenant with at least two places more than the newcomer's tenant gives one up, and an adapter
with two gives one up to an adapter of the same tenant that has none. A tenant of which nothing runs also takes places
of those that have received more service, even their last ones: at once for a new sequence; for one that has yielded
before, if it is behind by what recomputing the others costs.

A sequence that yields finds its blocks in the prefix cache when it continues. What was evicted meanwhile is computed
again at the expense of the tenant that it gave way to. So a tenant that takes places with one request after the other
falls behind, and waits until those who gave way have caught up: each of them receives more service between two yields
than they cost, and the counters of tenants that wait differ by at most the paper's bound and one such cost.

Background sequences have shares of their own, and take no places from others.

A tenant dominates while it has more running sequences than all others together (each divided by its tenant's weight),
or nothing of others runs; if others have work, or had some lately and may come back.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field

from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.sequence import Payer, Sequence

PREFILL, DECODE = 1.0, 2.0  # what a token costs: the paper's weights
LATELY = 256  # plans, or tries to make one


@dataclass(slots=True, eq=False)
class Share:
    """One tenant's share of a replica."""

    weight: float = 1.0
    served: float = 0.0  # the virtual counter
    waiting: int = 0  # sequences
    running: Counter[Adapter] = field(default_factory=Counter)  # sequences, by adapter
    total: int = 0  # sequences that run

    @property
    def order(self) -> tuple[float, float]:
        """The sort key of tenants: lower goes first. One that returns has the counter of another that has work, and
        goes before it, since nothing of it runs yet."""
        return self.served, self.total / self.weight

    @property
    def next_place(self) -> float:
        """How many sequences would run with one more, divided by the weight."""
        return (self.total + 1) / self.weight


class Shares:
    """The shares of all tenants. Their number is bounded by the key file, so counters are never dropped."""

    def __init__(self) -> None:
        self._all: dict[Payer, Share] = {}
        self._active: dict[Payer, Share] = {}  # those that have work
        self._last = 0.0  # the counter of the last one that had work
        self._background = 0  # how many of the active ones are background shares
        self._several_for = 0  # plans, until those who had work lately are forgotten

    def of(self, sequence: Sequence) -> Share:
        return self._all[sequence.payer]

    @property
    def several(self) -> bool:
        """Whether several tenants have work."""
        return len(self._active) > 1

    @property
    def background(self) -> bool:
        """Whether background sequences run or wait."""
        return self._background > 0

    def begin_plan(self) -> None:
        several = len(self._active) - self._background > 1
        self._several_for = LATELY if several else max(0, self._several_for - 1)

    def dominant(self) -> Payer | None:
        """The tenant that dominates."""
        if not self._several_for:
            return None
        work = {p: share.total / share.weight for p, share in self._active.items() if not p.background}
        most = max(work, key=work.__getitem__, default=None)
        if most is None or self._all[most].total + self._all[most].waiting < 2:
            return None
        others = sum(work.values()) - work[most]
        return most if work[most] > others or not others else None

    def others_wait(self, payer: Payer) -> bool:
        """Whether sequences of other tenants wait, without background ones."""
        return any(share.waiting for other, share in self._active.items() if other != payer and not other.background)

    def weight(self, payer: Payer) -> float:
        return self._all[payer].weight

    def by_adapter(self) -> dict[Adapter, set[Payer]]:
        """Whose sequences run with each adapter."""
        found: dict[Adapter, set[Payer]] = {}
        for payer, share in self._active.items():
            for adapter in share.running:
                found.setdefault(adapter, set()).add(payer)
        return found

    def waiting(self) -> dict[str, int]:
        """How many sequences of each tenant wait."""
        found = Counter[str]()
        for payer, share in self._active.items():
            found[payer.tenant] += share.waiting
        return dict(+found)

    def wait(self, sequence: Sequence) -> None:
        """The sequence starts waiting."""
        payer = sequence.payer
        share = self._all.setdefault(payer, Share())
        if payer not in self._active:
            lowest = min((other.served for other in self._active.values()), default=self._last)
            share.served = max(share.served, lowest)
            self._active[payer] = share
            self._background += payer.background
        share.weight = sequence.weight
        share.waiting += 1

    def stop_waiting(self, sequence: Sequence) -> None:
        """The sequence ended before it ran."""
        self.of(sequence).waiting -= 1
        self._update(sequence.payer)

    def run(self, sequence: Sequence) -> None:
        """The sequence stops waiting and runs."""
        share = self.of(sequence)
        share.waiting -= 1
        share.total += 1
        share.running[sequence.adapter] += 1

    def stop_running(self, sequence: Sequence) -> None:
        share = self.of(sequence)
        share.total -= 1
        share.running[sequence.adapter] -= 1
        if not share.running[sequence.adapter]:
            del share.running[sequence.adapter]
        self._update(sequence.payer)

    def charge(self, sequence: Sequence, stop: int) -> None:
        """Charges the positions up to `stop`: to the tenant, each once; when they are computed again, to the one that
        the sequence gave way to."""
        begin, prompt_length = sequence.charged, sequence.prompt_length
        if begin < sequence.computed:
            begin = sequence.computed
        elif begin > sequence.computed and sequence.gave_way_to:
            taker = self._all[sequence.gave_way_to]
            taker.served += (min(stop, begin) - sequence.computed) * PREFILL / taker.weight
        if begin < stop:  # faster than max, and this runs for every chunk
            prefills = min(stop, prompt_length) - begin if begin < prompt_length else 0
            share = self._all[sequence.payer]
            share.served += (prefills * PREFILL + (stop - begin - prefills) * DECODE) / share.weight
            sequence.charged = stop

    def even(self, waiting: Set[Adapter]) -> bool:
        """A quick check, sufficient in most steps: whether certainly nobody yields to a sequence of these adapters."""
        if len(self._active) != 1:
            return False
        (share,) = self._active.values()
        return waiting <= share.running.keys()

    def yielding(
        self, head: Sequence, running: Iterable[Sequence], lacking: int, blocks: Callable[[Sequence], int]
    ) -> list[Sequence]:
        """Which of the running sequences (oldest first) yield to the head, which lacks a row or so many blocks. None if
        all who would are not enough. `blocks`: how many a sequence leaves."""
        own = self.of(head)
        others: dict[Payer, list[Sequence]] = {}
        for sequence in running:
            others.setdefault(sequence.payer, []).append(sequence)
        siblings = others.pop(head.payer, [])
        yielding: list[Sequence] = []
        cost = (
            head.charged * PREFILL / own.weight
        )  # of computing again those who yield and, if it has yielded, the head
        while lacking > 0 or not yielding:
            if richest := self._with_much_more(others, own):
                sequence = others[richest].pop()
            elif adapter := _with_several(siblings, head.adapter):
                sequence = next(s for s in reversed(siblings) if s.adapter is adapter)
                siblings.remove(sequence)
            elif not own.total and (most := self._served_most(others)):
                sequence = others[most].pop()
                cost += sequence.computed * PREFILL / own.weight if head.attempts else 0.0
                if own.served + cost > self._all[most].served:
                    return []
            else:
                return []
            yielding.append(sequence)
            lacking -= blocks(sequence)
        return yielding

    def has_much_more(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether the sequence's tenant has so many more places than the other one's that it would give one up."""
        share, own = self.of(sequence), self.of(other)
        return share is not own and _much_more(share.total, share.weight, own)

    def _with_much_more(self, others: dict[Payer, list[Sequence]], own: Share) -> Payer | None:
        """Who has most places, if that is enough to give one up."""
        places = {payer: len(sequences) / self._all[payer].weight for payer, sequences in others.items()}
        richest = max(places, key=places.__getitem__, default=None)
        if richest and _much_more(len(others[richest]), self._all[richest].weight, own):
            return richest
        return None

    def _served_most(self, others: dict[Payer, list[Sequence]]) -> Payer | None:
        """Who has received most service, of those who have places."""
        return max((payer for payer in others if others[payer]), key=lambda p: self._all[p].served, default=None)

    def _update(self, payer: Payer) -> None:
        share = self._all[payer]
        if not (share.waiting or share.total):
            self._last = max(self._last, share.served)
            del self._active[payer]
            self._background -= payer.background


def _much_more(places: int, weight: float, own: Share) -> bool:
    """Whether a tenant with so many places gives one up to another one."""
    return (places - 1) / weight >= own.next_place


def _with_several(siblings: list[Sequence], adapter: Adapter) -> Adapter | None:
    """The adapter with most of a tenant's places, if it has two and this one has none."""
    places = Counter(sequence.adapter for sequence in siblings)
    if not places or adapter in places:
        return None
    (most, count), *_ = places.most_common(1)
    return most if count > 1 else None
