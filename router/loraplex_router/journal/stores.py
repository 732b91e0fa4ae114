"""Where the journal is: this router's memory, or a Redis server that several routers share."""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

MAX_BYTES = 256 << 20


class Store(Protocol):
    """Bytes by key. What is not written to for some time is forgotten."""

    shared: bool  # with other routers

    async def append(self, parts: Mapping[str, bytes], renewed: Collection[str], begun: Collection[str] = ()) -> None:
        """Adds the parts to what their keys have. What the keys in `renewed` have is kept longer now. `begun`: those
        whose usage others must count if this router dies. Raises UnavailableError if it may have failed."""
        ...

    async def read(self, key: str) -> bytes | None:
        """What a key has, which is kept longer now. Raises UnavailableError."""
        ...


class MemoryStore:
    """Beyond MAX_BYTES, what was not written to for longest is forgotten."""

    shared = False

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._kept: dict[str, tuple[float, bytearray]] = {}  # with the time of its last use, oldest first
        self._size = 0

    async def append(self, parts: Mapping[str, bytes], renewed: Collection[str], begun: Collection[str] = ()) -> None:
        for key in {**parts, **dict.fromkeys(renewed)}:
            self._use(key, parts.get(key, b""))
        self._forget()

    async def read(self, key: str) -> bytes | None:
        self._forget()
        return bytes(self._use(key)) if key in self._kept else None

    def _use(self, key: str, part: bytes = b"") -> bytearray:
        _, data = self._kept.pop(key, (0.0, bytearray()))
        data += part
        self._size += len(part)
        self._kept[key] = self._clock(), data
        return data

    def _forget(self) -> None:
        now = self._clock()
        for key, (used, data) in list(self._kept.items()):
            if used + self._seconds > now and self._size <= MAX_BYTES:
                break
            self._size -= len(data)
            del self._kept[key]
