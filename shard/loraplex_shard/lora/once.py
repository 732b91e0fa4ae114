"""Work that several callers ask for at the same time, and that is done once."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")


class Once:
    """May be used from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: dict[Hashable, Future[Any]] = {}

    def do(self, key: Hashable, work: Callable[[], T]) -> T:
        """Does the work, or waits for the call that is doing it and shares its result or error."""
        future = Future[T]()
        with self._lock:
            running = self._running.setdefault(key, future)
        if running is not future:
            return running.result()  # type: ignore[no-any-return]
        try:
            result = work()
            future.set_result(result)
            return result
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._running[key]
            # The error refers to this frame. If the frame referred to the future, which has the error, the cycle would
            # keep what was read in memory until the next garbage collection.
            del future, running
