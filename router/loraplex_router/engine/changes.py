"""Waiting for a condition on the router's state."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Changes:
    """One per router: code that changes something others may wait for calls `notify`. Free while nobody waits."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}

    def notify(self) -> None:
        """Something has changed: a sequence has ended, an adapter was loaded, a replica has come or gone."""
        for future, condition in list(self._waiting.items()):
            if not future.done() and condition():
                future.set_result(None)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once the condition holds. It may no longer hold when the caller resumes."""
        while not condition():
            future = asyncio.get_running_loop().create_future()
            self._waiting[future] = condition
            try:
                await future
            finally:
                del self._waiting[future]

    async def unlike(self, read: Callable[[], T], known: T) -> T:
        """The value of `read`, once it differs from `known`."""
        await self.until(lambda: read() != known)
        return read()
