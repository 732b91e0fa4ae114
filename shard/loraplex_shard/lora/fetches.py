"""Brings adapters' files from their sources to this machine's disk: each once at a time, with its progress."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import torch

from loraplex_protos.errors import AdapterSourceError
from loraplex_shard.lora.once import Once
from loraplex_shard.lora.peft.config import AdapterConfig
from loraplex_shard.lora.peft.headers import read_headers
from loraplex_shard.lora.sources.order import locate
from loraplex_shard.lora.sources.patience import Progress
from loraplex_shard.lora.sources.protocol import Origin, Source


class Fetches:
    """May be used from any thread."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self._once = Once()
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

    def locate(self, progress: Progress, token: str) -> Origin:
        """Raises the AdapterErrors of the sources."""
        return locate(self._sources, progress, token)

    def bring(self, origin: Origin, progress: Progress) -> dict[str, Path]:
        """Returns the paths of the files, by name. Raises the AdapterErrors of the source."""
        self._once.do(origin, lambda: origin.fetch(progress))
        return origin.fetch(progress)  # they are there now, whoever has fetched them


def check_headers(paths: Mapping[str, Path], check: Callable[[AdapterConfig, dict[str, torch.Tensor]], None]) -> None:
    """Raises AdapterInvalidError for what can be seen to be wrong with an adapter without reading its tensors' values.
    `check` is told their shapes."""
    try:
        config, shapes = read_headers(paths)
    except OSError as error:
        raise AdapterSourceError(f"the adapter's files cannot be read: {error.strerror}: try again") from error
    check(config, shapes)
