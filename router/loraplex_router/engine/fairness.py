"""Who goes first: fair shares of service among tenants and, within a tenant, among its adapters. Pure policy.

Tenants: the virtual token counter of Sheng et al. (OSDI 2024). Each tenant has a counter of the service that it
received: tokens divided by its weight. The tenant with the lowest counter goes first. A tenant that returns is raised
to the lowest counter of the active tenants, so that nobody saves up service. Within a tenant, the adapter with the
fewest running sequences goes first, with its oldest sequence.

The paper's server only decides admission: a newcomer waits until a running sequence ends. Here it need not: if all
places are taken, a tenant with at least two more than the newcomer's tenant gives one up, and an adapter with two gives
one up to an adapter of the same tenant that has none. A sequence that yields finds its blocks in the prefix cache when
it continues.

Background sequences have shares of their own, and take no places from others.
"""

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field

from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.sequence import Payer, Sequence

PREFILL, DECODE = 1.0, 2.0  # what a token costs: the paper's weights


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


class Shares:
    """The shares of all tenants. Their number is bounded by the key file, so counters are never dropped."""

    def __init__(self) -> None:
        self._all: dict[Payer, Share] = {}
        self._active: dict[Payer, Share] = {}  # those that have work
        self._last = 0.0  # the counter of the last one that had work

    def of(self, sequence: Sequence) -> Share:
        return self._all[sequence.payer]

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
        """Charges the positions up to `stop` to the tenant, each once, however often it is computed."""
        begin, prompt_length = sequence.charged, sequence.prompt_length
        if begin < sequence.computed:
            begin = sequence.computed
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

    def gives_way(self, newcomer: Sequence) -> tuple[Payer, Adapter | None] | None:
        """Whose youngest sequence yields its place to the newcomer: somebody's, or an adapter's of the newcomer's own.
        None if nobody has enough more."""
        own = self.of(newcomer)
        payer, share = max(self._active.items(), key=lambda item: item[1].total / item[1].weight)
        if _much_more(share, own):
            return payer, None
        if own.running and newcomer.adapter not in own.running:
            adapter, count = own.running.most_common(1)[0]
            if count > 1:
                return newcomer.payer, adapter
        return None

    def has_much_more(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether the sequence's tenant has so many more places than the other one's that it would give one up."""
        return _much_more(self.of(sequence), self.of(other))

    def _update(self, payer: Payer) -> None:
        share = self._all[payer]
        if not (share.waiting or share.total):
            self._last = max(self._last, share.served)
            del self._active[payer]


def _much_more(share: Share, own: Share) -> bool:
    return share is not own and (share.total - 1) / share.weight >= (own.total + 1) / own.weight
