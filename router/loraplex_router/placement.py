"""Which group a request goes to. Pure policy: no clock, no transport, no state, so that any router decides alike.

An adapter's requests go to the group that has it, which saves a load and finds its prefixes cached, unless that group
is much busier than the least busy one; what "much" means is `most_load`. Where no group has the adapter, it goes to the
least busy group with a slot to spare. Ties are broken by rendezvous hashing (Thaler and Ravishankar 1998) of the
adapter's name and the group's: no two routers need to talk to agree, and a group that comes or goes moves no adapter
but its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b

SLACK = 8  # sequences by which a group may be busier than the least busy one, whatever that one's load


class Residence(IntEnum):
    """How near an adapter is to a group's device."""

    ABSENT = 0
    FETCHING = 1
    HOST = 2
    DEVICE = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group that takes new sequences, as the placement of one adapter sees it."""

    name: str
    load: int  # sequences that run, wait, or are on their way
    has_spare_slot: bool  # a slot that nobody uses or waits for
    residence: Residence  # of the adapter


def most_load(least: int) -> int:
    """The load up to which a group counts as no busier than the least busy one: half as much again, and some slack."""
    return least + max(SLACK, least // 2)


def choose(adapter: str, candidates: Iterable[Candidate]) -> Candidate:
    """The group for a request with an adapter of this name; "" is the base model, which is everywhere.

    Raises ValueError if there are no candidates.
    """
    candidates = list(candidates)
    bound = most_load(min(candidate.load for candidate in candidates))
    fair = [candidate for candidate in candidates if candidate.load <= bound]
    nearest = max(candidate.residence for candidate in fair)
    if nearest is Residence.ABSENT:
        return min(fair, key=lambda group: (not group.has_spare_slot, group.load, -_score(adapter, group.name)))
    homes = (candidate for candidate in fair if candidate.residence is nearest)
    return min(homes, key=lambda group: (group.load, -_score(adapter, group.name)))


def _score(adapter: str, group: str) -> int:
    return int.from_bytes(blake2b(f"{adapter}\0{group}".encode(), digest_size=8).digest())
