"""Which replica a request goes to. Pure policy: no clock, no transport, no state, so that all routers decide alike.

An adapter's requests go to the replica that has it, which saves a load and finds its prefixes cached, unless that
replica is much busier than the least busy one; `max_load` defines "much". If no replica has the adapter, it goes to the
least busy replica with a spare slot. Ties are broken by rendezvous hashing (Thaler and Ravishankar 1998) of the
adapter's name and the replica's: routers agree without communication, and a replica that joins or leaves moves only its
own adapters.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from loraplex_router.vocabulary.adapter import Nearness

SLACK = 8  # sequences that a replica may always have more than the least busy one


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that accepts new sequences, from the point of view of one adapter."""

    name: str
    load: int  # running, waiting and arriving sequences
    has_spare_slot: bool  # a slot that nobody uses or waits for
    nearness: Nearness  # of the adapter


def max_load(least: int) -> int:
    """The highest load that counts as no busier than the least busy replica's load `least`."""
    return least + max(SLACK, least // 2)


def choose(adapter: str, candidates: Iterable[Candidate]) -> Candidate:
    """The replica for a request with an adapter of this name; "" is the base model, which is everywhere.

    Raises ValueError if there are no candidates.
    """
    candidates = list(candidates)
    bound = max_load(min(candidate.load for candidate in candidates))
    fair = [candidate for candidate in candidates if candidate.load <= bound]
    nearest = max(candidate.nearness for candidate in fair)
    if nearest is Nearness.ABSENT:
        return min(fair, key=lambda replica: (not replica.has_spare_slot, replica.load, -_score(adapter, replica.name)))
    homes = (candidate for candidate in fair if candidate.nearness is nearest)
    return min(homes, key=lambda replica: (replica.load, -_score(adapter, replica.name)))


def _score(adapter: str, replica: str) -> int:
    return int.from_bytes(blake2b(f"{adapter}\0{replica}".encode(), digest_size=8).digest())
