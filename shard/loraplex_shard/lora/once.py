"""Work that several callers ask for at the same time, and that is done once."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Any, TypeVar

from loraplex_protos.errors import UnavailableError

T = TypeVar("T")


class LeftError(UnavailableError):
    """Nobody needs the answer any more: who asked for the work has left."""


class Once:
    """May be used from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: dict[Hashable, Future[Any]] = {}

    def do(self, key: Hashable, work: Callable[[], T]) -> T:
        """Does the work, or waits for the call that is doing it and shares its result or error; if that one's caller
        left before, does it after all."""
        future = Future[T]()
        while (running := self._begin(key, future)) is not future:
            try:
                return running.result()
            except LeftError:
                continue
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

    def _begin(self, key: Hashable, future: Future[T]) -> Future[T]:
        """Returns the future of the call that does the work."""
        with self._lock:
            return self._running.setdefault(key, future)
