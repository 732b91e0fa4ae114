"""Limits the memory of adapters that are being staged."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class Room:
    """`size` bytes to be shared. May be used from any thread."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._changed = Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Waits until `size` bytes are free, and takes them. A larger size than the room waits for all of it."""
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()
