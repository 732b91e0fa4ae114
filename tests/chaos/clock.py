"""A wall clock that can be wrong, of a `loraplex` command: `python -m tests.chaos.clock ROUTER-OR-SHARD FLAGS`.

The file that the variable CLOCK names has by how many seconds it is ahead. Files and the monotonic clock keep right
time, as where another machine has the files.
"""

import mmap
import os
import struct
import time
from pathlib import Path

AHEAD = struct.Struct("d")


class Clock:
    """Sets the wall clock of processes that follow it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.environment = {"CLOCK": str(path)}
        path.write_bytes(AHEAD.pack(0))

    def set_ahead(self, seconds: float) -> None:
        with open(self._path, "r+b") as file:
            file.write(AHEAD.pack(seconds))


def follow() -> None:
    """This process and those that it forks have the wrong clock from now on."""
    with open(os.environ["CLOCK"], "rb") as file:
        ahead, right = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), time.time
    time.time = lambda: right() + AHEAD.unpack_from(ahead)[0]


if __name__ == "__main__":
    from loraplex.cli.main import main

    follow()
    main()
