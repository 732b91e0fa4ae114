"""Which replica a request goes to. Pure policy: no clock, no transport, no state, so that any router decides alike.

An adapter's requests go to the replica that has it, which saves a load and finds its prefixes cached, unless that
replica is much busier than the least busy one; what "much" means is `most_load`. Where no replica has the adapter, it
goes to the least busy replica with a slot to spare. Ties are broken by rendezvous hashing (Thaler and Ravishankar 1998)
of the adapter's name and the replica's: no two routers need to talk to agree, and a replica that comes or goes moves no
adapter but its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from loraplex_router.vocabulary.adapter import Nearness

SLACK = 8  # sequences by which a replica may be busier than the least busy one, whatever that one's load


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that takes new sequences, as the placement of one adapter sees it."""

    name: str
    load: int  # sequences that run, wait, or are on their way
    has_spare_slot: bool  # a slot that nobody uses or waits for
    nearness: Nearness  # of the adapter


def most_load(least: int) -> int:
    """The load up to which a replica counts as no busier than the least busy one: half as much again, and some
    slack."""
    return least + max(SLACK, least // 2)


def choose(adapter: str, candidates: Iterable[Candidate]) -> Candidate:
    """The replica for a request with an adapter of this name; "" is the base model, which is everywhere.

    Raises ValueError if there are no candidates.
    """
    candidates = list(candidates)
    bound = most_load(min(candidate.load for candidate in candidates))
    fair = [candidate for candidate in candidates if candidate.load <= bound]
    nearest = max(candidate.nearness for candidate in fair)
    if nearest is Nearness.ABSENT:
        return min(fair, key=lambda replica: (not replica.has_spare_slot, replica.load, -_score(adapter, replica.name)))
    homes = (candidate for candidate in fair if candidate.nearness is nearest)
    return min(homes, key=lambda replica: (replica.load, -_score(adapter, replica.name)))


def _score(adapter: str, replica: str) -> int:
    return int.from_bytes(blake2b(f"{adapter}\0{replica}".encode(), digest_size=8).digest())
