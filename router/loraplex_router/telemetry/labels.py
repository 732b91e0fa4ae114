"""Chooses the adapters with their own time series: the most requested ones, up to a limit.

Counts requests by name, and halves the counts periodically, so that the past fades. A name replaces the least used one
once it has more than twice as many requests; the factor keeps names from swapping back and forth.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from hashlib import sha256

from loraplex_router.vocabulary.adapter import OTHER

MAX_LENGTH = 128  # of a label; hub ids have 96 at most
MARK = 16  # characters that tell apart what begins alike
CANDIDATES = 10  # names counted without a series, per name with one
HALF_LIFE = 4096  # requests


class AdapterLabels:
    """Label values for adapters; never more than `most` and OTHER. `drop` is called with each label that is given
    up."""

    def __init__(self, most: int, drop: Callable[[str], None]) -> None:
        self._most = most
        self._drop = drop
        self._shown: dict[str, int] = {}
        self._candidates: OrderedDict[str, int] = OrderedDict()  # least recently asked for first
        self._requests = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._shown)

    def find(self, name: str) -> str:
        """The label of an adapter."""
        label = _printable(name)
        return label if label in self._shown else OTHER

    def count(self, name: str) -> str:
        """Counts a request for an existing adapter and returns its label."""
        label = _printable(name)
        self._fade()
        if label in self._shown:
            self._shown[label] += 1
        elif len(self._shown) < self._most:
            self._shown[label] = 1
        else:
            self._count_candidate(label)
        return self.find(name)

    def _count_candidate(self, label: str) -> None:
        count = self._candidates.pop(label, 0) + 1
        least = min(self._shown, key=self._shown.__getitem__, default=None)
        if least is None or count <= 2 * self._shown[least]:
            self._candidates[label] = count
        else:
            self._candidates[least] = self._shown.pop(least)
            self._shown[label] = count
            self._drop(least)
        if len(self._candidates) > CANDIDATES * self._most:
            self._candidates.popitem(last=False)

    def _fade(self) -> None:
        self._requests += 1
        if self._requests % HALF_LIFE == 0:
            for counts in (self._shown, self._candidates):
                for label in counts:
                    counts[label] //= 2


def _printable(name: str) -> str:
    """Clients' text may contain anything, even lone surrogates, which UTF-8 cannot encode. If a name is too long or not
    printable, its label ends with a hash, so that no two names have one label."""
    label = "".join(c if c.isprintable() else "?" for c in name[:MAX_LENGTH])
    if label == name:
        return label
    return f"{label[: MAX_LENGTH - MARK - 1]}~{sha256(name.encode(errors='surrogatepass')).hexdigest()[:MARK]}"
