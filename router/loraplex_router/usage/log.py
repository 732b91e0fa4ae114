"""Usage events in a file: a line of JSON each, appended at once by a thread of its own, which may wait for the disk."""

import asyncio
import logging
import os
from contextlib import suppress
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import orjson

MOST_UNWRITTEN = 16 << 20  # bytes that are kept while the file cannot be written to
AGAIN_SECONDS = 1.0  # between two tries then
WRITE_SECONDS = 1.0  # which a write to a disk that works does not take
CLOSE_SECONDS = 5.0

logger = logging.getLogger(__name__)


class UsageLog:
    """Follows the file's name: if the file is moved away or removed, a new one is begun. Several routers may write to
    one file. Raises OSError with the fix if the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = Condition()
        self._unwritten = bytearray()  # whole lines
        self._fails = False  # whether the file cannot be written to, or a write does not end
        self._closing = False
        try:
            self._file = self._open()
        except OSError as error:
            raise OSError(f"--usage-log: {path} cannot be written to: {error.strerror}") from error
        self._thread = Thread(target=self._run, name="usage log", daemon=True)
        self._thread.start()

    def __call__(self, described: dict[str, Any]) -> None:
        """Writes an event soon, or as soon as the file can be written to."""
        line = orjson.dumps(described) + b"\n"
        with self._changed:
            if len(self._unwritten) < MOST_UNWRITTEN:
                self._unwritten += line
                self._changed.notify_all()
                return
        logger.error("a usage event is lost: %s", line.decode().rstrip())

    async def written(self) -> None:
        """Returns when all events so far are in the file, or it turns out that they cannot be written now."""
        if self._unwritten and not self._fails:
            await asyncio.to_thread(self._wait)

    def close(self) -> None:
        """Tries a last time to write what is not written yet. Blocks for CLOSE_SECONDS at most."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        if lost := self._unwritten.count(b"\n"):
            logger.error("%d usage events are lost: the file cannot be written to", lost)
        if not self._thread.is_alive():
            os.close(self._file)

    def _wait(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._fails or not self._unwritten, WRITE_SECONDS):
                self._fail("the disk does not answer")

    def _run(self) -> None:
        last = False
        while not last:
            with self._changed:
                self._changed.wait_for(lambda: self._unwritten or self._closing)
                last, lines = self._closing, bytes(self._unwritten)
            try:
                self._append(lines)
            except OSError as error:
                with self._changed:
                    self._fail(error.strerror)
                    self._changed.wait_for(lambda: self._closing, AGAIN_SECONDS)

    def _fail(self, why: str | None) -> None:
        if not self._fails:
            logger.error("usage events are kept for now: %s cannot be written to: %s", self._path, why)
        self._fails = True
        self._changed.notify_all()

    def _append(self, lines: bytes) -> None:
        """Writes the lines, of which those that are in the file are no longer unwritten. Raises OSError; what is in the
        file then are whole lines."""
        if self._moved():
            former, self._file = self._file, self._open()
            os.close(former)
        written = 0
        try:
            while written < len(lines):
                written += os.write(self._file, lines[written:])
        finally:
            whole = lines.rfind(b"\n", 0, written) + 1
            if written > whole:
                self._cut_off(written - whole)
            with self._changed:
                del self._unwritten[:whole]
                self._fails = self._fails and written < len(lines)
                self._changed.notify_all()

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
