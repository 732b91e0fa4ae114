"""How much memory requests may take together. Pure policy."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from loraplex_router.access.keys import Keys
from loraplex_router.access.tenant import Tenant

FULL = "other requests are large: try again later"


class Holding:
    """What one request takes of a room."""

    def __init__(self, room: "Room", tenant: Tenant) -> None:
        self.taken = 0  # bytes
        self._room = room
        self._tenant = tenant

    def take(self, size: int) -> bool:
        """Takes more, of which all is given back when the request is answered. Whether there was room for it."""
        self.taken += size
        return self._room.take(self._tenant, size)


class Room:
    """With keys, a tenant has half of the room that others leave, so that there is always some for somebody else."""

    def __init__(self, size: int, keys: Keys) -> None:
        """`size`: in bytes."""
        self._free = size
        self._keys = keys
        self._taken: Counter[Tenant] = Counter()  # bytes

    @contextmanager
    def holding(self, tenant: Tenant) -> Iterator[Holding]:
        """What a request takes, while it is answered: nothing at first."""
        holding = Holding(self, tenant)
        try:
            yield holding
        finally:
            self.take(tenant, -holding.taken)

    def take(self, tenant: Tenant, size: int) -> bool:
        """For Holding."""
        self._free -= size
        self._taken[tenant] += size
        if not self._taken[tenant]:
            del self._taken[tenant]
        return self._free >= 0 and not (self._keys.required and self._taken[tenant] > self._free)
