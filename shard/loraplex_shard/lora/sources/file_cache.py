"""Files from object stores on this machine's disk, shared by all processes."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import IO

LOOK_SECONDS = 0.05  # between two looks whether another process has brought a file
_PART = ".part"  # the end of the name of a file that has not arrived as a whole


class FileCache:
    """Together, the files take at most half of the disk's space that others leave. The least recently used leave."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str, size: int, bring: Callable[[IO[bytes]], None]) -> Path:
        """The path of the file with this key, which stands for its content. If it is not there, `bring` writes it: it
        gets what arrived before, positioned at the end. Raises OSError and what `bring` raises."""
        path = self._folder / sha256(key.encode()).hexdigest()
        if not _use(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(_PART)
            with part.open("a+b") as file:
                _lock(file)
                if _use(path):  # another process has brought it meanwhile, as this file or another one
                    with suppress(FileNotFoundError):
                        if part.stat().st_ino != path.stat().st_ino:
                            part.unlink()
                    return path
                self._make_room(size)
                bring(file)
                file.flush()
                part.replace(path)
        return path

    def _make_room(self, size: int) -> None:
        with os.scandir(self._folder) as entries:
            found = [(entry, entry.stat()) for entry in entries if not entry.name.endswith(_PART)]
        taken = sum(status.st_size for _, status in found)
        most = (taken + shutil.disk_usage(self._folder).free) // 2
        for entry, status in sorted(found, key=lambda each: each[1].st_mtime_ns):
            if taken + size <= most:
                break
            with suppress(FileNotFoundError):
                os.unlink(entry.path)
            taken -= status.st_size


def _lock(file: IO[bytes]) -> None:
    """Waits while another process brings the file, but not in the kernel: `stager.py` takes a process that does nothing
    for one that hangs."""
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOOK_SECONDS)


def _use(path: Path) -> bool:
    """Whether the file is there; if so, it is the most recently used one."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
