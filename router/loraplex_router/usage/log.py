"""Usage events in a file: a line of JSON each, appended at once."""

import logging
import os
from pathlib import Path
from typing import Any

import orjson

MOST_UNWRITTEN = 16 << 20  # bytes that are kept while the file cannot be written to

logger = logging.getLogger(__name__)


class UsageLog:
    """Follows the file's name: if the file is moved away or removed, a new one is begun. Several routers may write to
    one file. Raises OSError with the fix if the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten = b""
        self._fails = False
        try:
            self._open()
        except OSError as error:
            raise OSError(f"--usage-log: {path} cannot be written to: {error.strerror}") from error

    def __call__(self, described: dict[str, Any]) -> None:
        """Writes an event. What cannot be written now is written with a later one."""
        if len(self._unwritten) < MOST_UNWRITTEN:
            self._unwritten += orjson.dumps(described) + b"\n"
        else:
            logger.error("a usage event is lost: %s", orjson.dumps(described).decode())
        try:
            if self._moved():
                os.close(self._file)
                self._open()
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:
            if not self._fails:
                logger.error("usage events are kept for now: %s cannot be written to: %s", self._path, error.strerror)
            self._fails = True
        else:
            self._fails = False

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)

    def _moved(self) -> bool:
        try:
            return not os.path.samestat(os.fstat(self._file), os.stat(self._path))
        except FileNotFoundError:
            return True
