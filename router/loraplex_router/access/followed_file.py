"""Follows a file of the operator's, such as the key file or one in a Kubernetes ConfigMap."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

LOOK_SECONDS = 1.0

T = TypeVar("T")


class FollowedFile:
    """Remembers the file's state when it was made, so that no later change is missed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, path.name)
        self.seen = self.state()

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Calls what opens the file, on a thread that nothing else waits for: its disk may hang."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *arguments))

    async def changes(self) -> AsyncIterator[None]:
        """Yields whenever the file has changed. Never ends."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if (state := await self.run(self.state)) != self.seen:
                self.seen = state
                yield

    def state(self) -> tuple[int, ...]:
        """Another one whenever the file is another one. Blocks, for as long as a disk hangs."""
        try:
            with open(self._path, "rb") as file:  # so that network file systems ask the server, not their cache
                return state_of(os.fstat(file.fileno()))
        except OSError:
            return ()


def state_of(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns
