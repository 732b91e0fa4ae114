"""Writes files that others read meanwhile."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> os.stat_result:
    """Either the old content or what `write` writes is there, whatever happens. Two calls for the same path at the same
    time are the caller's mistake. Returns the new file's status. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    try:
        with open(new, "wb") as file:
            if path.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            write(file)
            file.flush()
            os.fsync(file.fileno())
            status = os.fstat(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return status
