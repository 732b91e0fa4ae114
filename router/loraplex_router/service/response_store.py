"""Responses that later requests refer to: in this router's memory, within limits."""

import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

MOST_SECONDS = 24 * 3600.0  # since it was kept, or last referred to
OVERHEAD = 1024  # bytes of an entry besides its content, so that small ones are limited, too


class _Kept(NamedTuple):
    content: bytes
    until: float


class ResponseStore:
    """Each tenant has responses of its own. When there is no more room, the tenant that has the most loses those that
    were not referred to for the longest time. `most_bytes`: of all together; 0 keeps nothing."""

    def __init__(self, most_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes = most_bytes
        self._clock = clock
        self._kept: dict[str, dict[str, _Kept]] = {}  # by tenant; the next to go comes first
        self._bytes = Counter[str]()  # by tenant

    @property
    def keeps(self) -> bool:
        return self._most_bytes > 0

    def put(self, tenant: str, id: str, content: bytes) -> None:
        """Keeps a response, in place of one with the same id, unless it is larger than all may be together."""
        self.delete(tenant, id)
        if len(content) + OVERHEAD > self._most_bytes:
            return
        self._kept.setdefault(tenant, {})[id] = _Kept(content, self._clock() + MOST_SECONDS)
        self._bytes[tenant] += len(content) + OVERHEAD
        self._drop_old()
        while self._bytes.total() > self._most_bytes:
            largest = max(self._bytes, key=self._bytes.__getitem__)
            self.delete(largest, next(iter(self._kept[largest])))

    def get(self, tenant: str, id: str) -> bytes | None:
        """None: the tenant has none with this id, or not any more."""
        self._drop_old()
        if id not in self._kept.get(tenant, ()):
            return None
        content = self._kept[tenant].pop(id).content
        self._kept[tenant][id] = _Kept(content, self._clock() + MOST_SECONDS)
        return content

    def delete(self, tenant: str, id: str) -> bool:
        """Whether there was one with this id."""
        if id not in self._kept.get(tenant, ()):
            return False
        kept = self._kept[tenant].pop(id)
        self._bytes[tenant] -= len(kept.content) + OVERHEAD
        if not self._kept[tenant]:
            del self._kept[tenant], self._bytes[tenant]
        return True

    def _drop_old(self) -> None:
        now = self._clock()
        for tenant, kept in list(self._kept.items()):
            while kept and next(iter(kept.values())).until < now:
                self.delete(tenant, next(iter(kept)))
