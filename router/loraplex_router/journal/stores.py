"""Where the journal is: this router's memory, or a Redis server that several routers share."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

MAX_BYTES = 256 << 20


class Store(Protocol):
    """Bytes by key. What is not written to for some time is forgotten."""

    shared: bool  # with other routers

    async def append(
        self, parts: Mapping[str, bytes], records: Mapping[str, bytes], begun: Mapping[str, str]
    ) -> Collection[str]:
        """Adds the parts, of which some may be empty, to what their keys have, which is kept longer now. Keys that have
        nothing begin with their records, and so do not begin twice; those without a record are left alone and returned.
        `begun`: those whose usage others must count if this router dies, all that have records among them, with their
        tenants. Raises UnavailableError if it may have failed."""
        ...

    async def read(self, key: str) -> bytes | None:
        """What a key has, which is kept longer now. Raises UnavailableError."""
        ...


@dataclass(slots=True)
class _Kept:
    tenant: str
    used: float = 0.0  # when it was used last
    data: bytearray = field(default_factory=bytearray)


class MemoryStore:
    """Beyond MAX_BYTES, the tenant that has the most loses what was not written to for longest."""

    shared = False

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._kept: dict[str, _Kept] = {}  # what was not used for longest comes first, here and of each tenant
        self._of: dict[str, dict[str, None]] = {}  # their keys, by tenant
        self._bytes = Counter[str]()  # by tenant

    async def append(
        self, parts: Mapping[str, bytes], records: Mapping[str, bytes], begun: Mapping[str, str]
    ) -> Collection[str]:
        for key, part in parts.items():
            if key in self._kept:
                self._add(key, part)
            elif key in records:
                self._add(key, records[key] + part, begun[key])
        self._forget()
        return ()  # what had no room is not begun again: it would push out others, step after step

    async def read(self, key: str) -> bytes | None:
        self._forget()
        return bytes(self._use(key).data) if key in self._kept else None

    def _add(self, key: str, data: bytes, tenant: str = "") -> None:
        kept = self._use(key, tenant)
        kept.data += data
        self._bytes[kept.tenant] += len(data)

    def _use(self, key: str, tenant: str = "") -> _Kept:
        kept = self._kept.pop(key, None) or _Kept(tenant)
        kept.used = self._clock()
        self._kept[key] = kept
        keys = self._of.setdefault(kept.tenant, {})
        keys.pop(key, None)
        keys[key] = None
        return kept

    def _forget(self) -> None:
        old = self._clock() - self._seconds
        while self._kept and self._kept[key := next(iter(self._kept))].used <= old:
            self._drop(key)
        while self._bytes.total() > MAX_BYTES:
            largest = max(self._bytes, key=self._bytes.__getitem__)
            self._drop(next(iter(self._of[largest])))

    def _drop(self, key: str) -> None:
        kept = self._kept.pop(key)
        del self._of[kept.tenant][key]
        self._bytes[kept.tenant] -= len(kept.data)
        if not self._of[kept.tenant]:
            del self._of[kept.tenant], self._bytes[kept.tenant]
