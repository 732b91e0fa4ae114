"""Trying again when a source is busy: with growing pauses, or those that the source asks for."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from loraplex_protos.errors import AdapterSourceError, quote

FIRST_WAIT = 0.25  # seconds; each further one is twice as long, and jitter shortens it by up to a half
TRIES = 4  # without any progress
PATIENCE = 10.0  # seconds without any progress, after which nothing is tried again
BUSY = frozenset({408, 429, 500, 502, 503, 504})  # statuses of answers that may be another one soon

logger = logging.getLogger(__name__)

Report = Callable[[int, int, str], object]  # takes what Progress has in `done`, `total` and `trouble`
REPORT_SECONDS = 0.1  # between two reports of progress

T = TypeVar("T")


class SourceBusyError(AdapterSourceError):
    """The source did not answer, or not properly, and may do so later: after `retry_after` seconds, if it said so."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(slots=True, eq=False)
class Progress:
    """How much of an adapter's files is on this machine's disk. Written by who fetches them, and reported now and then
    by calls of `report`."""

    id: str  # as requested, like the next two
    source: str = ""
    revision: str = ""
    report: Report = lambda done, total, trouble: None
    done: int = 0  # bytes
    total: int = 0  # 0: not known yet
    trouble: str = ""  # why the last try failed, while the next one is waited for
    _reported: float = field(default=-REPORT_SECONDS, init=False)

    def reach(self, done: int) -> None:
        """So many bytes are on disk."""
        self.done = done
        if (now := time.monotonic()) >= self._reported + REPORT_SECONDS:
            self._reported = now
            self.report(self.done, self.total, self.trouble)

    def wait(self, seconds: float, trouble: str) -> None:
        """Waits after a try that has failed."""
        self.trouble = trouble
        self.report(self.done, self.total, trouble)
        time.sleep(seconds)
        self.trouble = ""
        self.report(self.done, self.total, "")

    def take(self, done: int, total: int, trouble: str) -> None:
        """Takes over what was reported."""
        self.done, self.total, self.trouble = done, total, trouble


def patiently(work: Callable[[], T], progress: Progress) -> T:
    """Does the work, again while it raises SourceBusyError. Raises the last error after TRIES without progress, or at
    once if the source asks for more patience than there is."""
    tries, began, before = 0, time.monotonic(), progress.done
    while True:
        try:
            return work()
        except SourceBusyError as error:
            now = time.monotonic()
            if progress.done > before:
                tries, began, before = 0, now, progress.done
            tries += 1
            wait = error.retry_after
            if wait is None:
                wait = FIRST_WAIT * 2 ** (tries - 1) * random.uniform(0.5, 1)
            if tries == TRIES or now + wait - began > PATIENCE:
                raise
            logger.warning("adapter %s: %s; trying again in %.1f s", quote(progress.id), error.message, wait)
            progress.wait(wait, error.message)
