"""A wall clock that can be wrong, of a `loraplex` command: `python -m tests.chaos.clock ROUTER-OR-SHARD FLAGS`.

The file that the variable CLOCK names has by how many seconds it is ahead. Files and the monotonic clock keep right
time, as where another machine has the files.
"""

import mmap
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import grpc

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
    _spare_grpc(right)


def _spare_grpc(right: Callable[[], float]) -> None:
    """Its C core has a right clock, and would wait for hours for what its Python code calls now."""
    spared = ModuleType("time")
    vars(spared).update(vars(time), time=right)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == grpc.__name__ and vars(module).get("time") is time:
            vars(module)["time"] = spared


if __name__ == "__main__":
    from loraplex.cli.main import main

    follow()
    main()
