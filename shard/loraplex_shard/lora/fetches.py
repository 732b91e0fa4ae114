"""The fetches that a rank's calls are busy with, for those who ask how far they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from loraplex_shard.lora.sources.patience import Progress


class Fetches:
    """May be used from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: list[Progress] = []

    def current(self) -> list[Progress]:
        """The running ones, one per id, source and revision."""
        with self._lock:
            furthest = sorted(self._running, key=lambda progress: progress.done)
        return list({(each.id, each.source, each.revision): each for each in furthest}.values())

    @contextmanager
    def started(self, id: str, source: str, revision: str) -> Iterator[Progress]:
        """A context in which a fetch is a current one."""
        progress = Progress(id, source, revision)
        with self._lock:
            self._running.append(progress)
        try:
            yield progress
        finally:
            with self._lock:
                self._running.remove(progress)
