"""Brings the files of registered versions to the disks of all replicas before the first request for them: a few at a
time, and none while requests bring adapters. Nothing is loaded."""

import asyncio
import logging
import random
from collections import deque
from dataclasses import dataclass, field

from loraplex_protos.errors import (
    AdapterSourceError,
    DeadlineError,
    LoraplexError,
    OverloadedError,
    UnavailableError,
    quote,
)
from loraplex_router.adapters.registry import Registry
from loraplex_router.replicas.replica import Replica
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.vocabulary.references import AdapterReference, Upload

AT_A_TIME = 2  # per replica
FIRST_WAIT, LONGEST_WAIT = 30.0, 1800.0  # seconds until a failed one is tried again; twice as long each time
PASSING = AdapterSourceError, OverloadedError, UnavailableError, DeadlineError  # errors that may not come again

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Prefetched:
    """What became of one version on one replica."""

    fetched_bytes: int | None = None  # None: it is not fetched
    reason: str = ""  # why it could not be fetched when it was last tried
    failures: int = 0


@dataclass(slots=True)
class _Work:
    """What is done and still to be done on one replica."""

    results: dict[AdapterReference, Prefetched] = field(default_factory=dict)
    due: deque[AdapterReference] = field(default_factory=deque)
    running: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def fetched_bytes(self) -> int:
        return sum(result.fetched_bytes or 0 for result in self.results.values())


class Prefetching:
    """`run` is its task. On each replica, it fetches until there are `most_bytes`, over all versions; 0: nothing."""

    def __init__(self, registry: Registry, replicas: Replicas, most_bytes: int) -> None:
        self._registry = registry
        self._replicas = replicas
        self._most = most_bytes
        self._work: dict[Replica, _Work] = {}

    def results(self, version: AdapterReference) -> list[Prefetched]:
        """What became of a version, on the replicas where it was tried."""
        return [work.results[version] for work in self._work.values() if version in work.results]

    async def run(self) -> None:
        """Until cancelled."""
        if not self._most:
            return
        known = -1, -1
        try:
            while True:
                known = await self._replicas.changes.unlike(
                    lambda: (self._registry.edition, self._replicas.version), known
                )
                self._update()
        finally:
            for work in self._work.values():
                for task in work.running:
                    task.cancel()

    def _update(self) -> None:
        versions = {each for each in self._registry.versions() if not isinstance(each.origin, Upload)}
        for gone in self._work.keys() - set(self._replicas):
            for task in self._work.pop(gone).running:
                task.cancel()
        for replica in self._replicas:
            work = self._work.setdefault(replica, _Work())
            work.results = {version: result for version, result in work.results.items() if version in versions}
            work.due = deque(sorted(versions - work.results.keys(), key=lambda version: version.id))
            self._start(replica, work)

    def _start(self, replica: Replica, work: _Work) -> None:
        for _ in range(min(len(work.due), AT_A_TIME - len(work.running))):
            task = asyncio.create_task(self._fetch_due(replica, work))
            work.running.add(task)
            task.add_done_callback(work.running.discard)

    async def _fetch_due(self, replica: Replica, work: _Work) -> None:
        while work.due:
            await self._replicas.changes.until(lambda: replica.accepting and not replica.adapters.fetching())
            if work.due and work.fetched_bytes >= self._most:
                logger.warning(
                    "%d registered adapters are not fetched before their first request: --adapter-prefetch-gib",
                    len(work.due),
                )
                work.due.clear()
            if work.due:
                await self._fetch(replica, work, work.due.popleft())

    async def _fetch(self, replica: Replica, work: _Work, version: AdapterReference) -> None:
        origin = version.origin
        assert isinstance(origin, AdapterReference)
        result = work.results.setdefault(version, Prefetched())
        try:
            result.fetched_bytes = await replica.shards.fetch(origin)
        except LoraplexError as error:
            result.reason = error.message
            result.failures += 1
            logger.warning("cannot fetch the registered adapter %s: %s", quote(version.id), error.message)
            if isinstance(error, PASSING):
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (result.failures - 1)) * random.uniform(0.5, 1)
                asyncio.get_running_loop().call_later(wait, self._try_again, replica, version)
        else:
            result.reason = ""

    def _try_again(self, replica: Replica, version: AdapterReference) -> None:
        work = self._work.get(replica)
        if work is not None and version in work.results:  # it has not left meanwhile
            work.due.append(version)
            self._start(replica, work)
