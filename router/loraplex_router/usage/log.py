"""Usage events in a file: a line of JSON each, appended at once."""

import asyncio
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

MOST_UNWRITTEN = 16 << 20  # bytes that are kept while the file cannot be written to
AGAIN_SECONDS = 1.0  # between two tries then

logger = logging.getLogger(__name__)


class UsageLog:
    """Follows the file's name: if the file is moved away or removed, a new one is begun. Several routers may write to
    one file. To be called where an event loop runs. Raises OSError with the fix if the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten = b""  # whole lines
        self._again: asyncio.TimerHandle | None = None  # set while the file cannot be written to
        try:
            self._file = self._open()
        except OSError as error:
            raise OSError(f"--usage-log: {path} cannot be written to: {error.strerror}") from error

    def __call__(self, described: dict[str, Any]) -> None:
        """Writes an event, now or as soon as the file can be written to."""
        if len(self._unwritten) < MOST_UNWRITTEN:
            self._unwritten += orjson.dumps(described) + b"\n"
        else:
            logger.error("a usage event is lost: %s", orjson.dumps(described).decode())
        if self._again is None:
            self._write()

    def close(self) -> None:
        """Tries a last time to write what is not written yet."""
        if self._again:
            self._again.cancel()
            with suppress(OSError):
                self._append()
        if self._unwritten:
            logger.error("%d usage events are lost: the file cannot be written to", self._unwritten.count(b"\n"))
        os.close(self._file)

    def _write(self) -> None:
        try:
            self._append()
        except OSError as error:
            if self._again is None:
                logger.error("usage events are kept for now: %s cannot be written to: %s", self._path, error.strerror)
            self._again = asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._write)
        else:
            self._again = None

    def _append(self) -> None:
        """Raises OSError; what is in the file then are whole lines."""
        if self._moved():
            former, self._file = self._file, self._open()
            os.close(former)
        written = 0
        try:
            while written < len(self._unwritten):
                written += os.write(self._file, self._unwritten[written:])
        finally:
            whole = self._unwritten.rfind(b"\n", 0, written) + 1
            self._unwritten = self._unwritten[whole:]
            if written > whole:
                self._cut_off(written - whole)

    def _cut_off(self, size: int) -> None:
        """Removes the begin of a line that was written last, unless another router has written after it."""
        with suppress(OSError):  # it is a device or a pipe
            end = os.lseek(self._file, 0, os.SEEK_CUR)
            if os.fstat(self._file).st_size == end:
                os.ftruncate(self._file, end - size)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)

    def _moved(self) -> bool:
        try:
            return not os.path.samestat(os.fstat(self._file), os.stat(self._path))
        except FileNotFoundError:
            return True
