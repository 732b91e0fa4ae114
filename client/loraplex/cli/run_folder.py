"""The folder in which a replica's processes meet: their sockets are there while they run."""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "loraplex-"
LOCK = ".owner"  # the file in it that its owner has locked, for as long as it lives
_NAME = re.compile(rf"{PREFIX}[a-z0-9_]{{8}}")


@contextmanager
def run_folder() -> Iterator[str]:
    """A folder that nobody else has, during the block. Those of processes that were killed are deleted first."""
    _delete_left()
    folder = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))  # hidden from others until it is locked
    try:
        with (folder / LOCK).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder = folder.rename(folder.with_name(folder.name.removeprefix(".")))
            yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _delete_left() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is another user's, its owner lives, or somebody else deletes it
            if not _NAME.fullmatch(folder.name) or folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            with (folder / LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
