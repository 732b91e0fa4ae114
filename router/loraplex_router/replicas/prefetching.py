"""Brings the files of registered versions to the disks of all replicas before the first request for them: a few at a
time, and none while requests bring adapters. Nothing is loaded."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

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
from loraplex_router.vocabulary.references import AdapterReference

AT_A_TIME = 2  # per replica
LOOK_AT = 200  # versions without a pause
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

    results: dict[str, tuple[AdapterReference, Prefetched]] = field(default_factory=dict)  # by the version's name
    again: deque[AdapterReference] = field(default_factory=deque)  # that failed
    others: Iterator[AdapterReference] = field(default_factory=lambda: iter(()))  # some of which have results
    fetched_bytes: int = 0
    running: set[asyncio.Task[None]] = field(default_factory=set)

    def result(self, version: AdapterReference) -> Prefetched | None:
        found = self.results.get(version.id)
        return found[1] if found is not None and found[0] == version else None


class Prefetching:
    """`run` is its task. On each replica, it fetches until there are `most_bytes`, over all versions; 0: nothing."""

    def __init__(self, registry: Registry, replicas: Replicas, most_bytes: int) -> None:
        self._registry = registry
        self._replicas = replicas
        self._most = most_bytes
        self._work: dict[Replica, _Work] = {}
        self._looked: dict[str, tuple[AdapterReference, str]] = {}  # by name, with why no source can have it

    def results(self, version: AdapterReference) -> list[Prefetched]:
        """What became of a version, on the replicas where it was tried."""
        if reason := self._refusal(version):
            return [Prefetched(reason=reason)]
        return [result for work in self._work.values() if (result := work.result(version)) is not None]

    async def run(self) -> None:
        """Until cancelled."""
        known = -1, -1
        try:
            while True:
                known = await self._replicas.changes.unlike(
                    lambda: (self._registry.edition, self._replicas.version), known
                )
                with suppress(LoraplexError):  # the replica has left
                    await self._look()
                if self._most:
                    await self._update()
        finally:
            for work in self._work.values():
                for task in work.running:
                    task.cancel()

    async def _look(self) -> None:
        """Finds out which versions no source can have, and says so."""
        replica = next((replica for replica in self._replicas if replica.accepting), None)
        former, versions = self._looked, self._versions()
        while replica is not None and (part := list(islice(versions, LOOK_AT))):
            looked = [former.get(version.id) for version in part]
            new = [
                version
                for version, known in zip(part, looked, strict=True)
                if known is None or known[1] or known[0] != version
            ]
            origins = [version.origin for version in new if isinstance(version.origin, AdapterReference)]
            reasons = await replica.shards.refusals(origins) if origins else []
            for version, reason in zip(new, reasons, strict=True):
                if reason and former.get(version.id) != (version, reason):
                    logger.error("the registered adapter %s cannot be served: %s", quote(version.id), reason)
                self._looked[version.id] = version, reason
            await asyncio.sleep(0)
        if len(self._looked) > 2 * len(self._registry.content.lines):
            self._looked = {id: looked for id, looked in self._looked.items() if self._registry.find(id) is not None}

    def _refusal(self, version: AdapterReference) -> str:
        known, reason = self._looked.get(version.id, (None, ""))
        return reason if known == version else ""

    async def _update(self) -> None:
        for gone in self._work.keys() - set(self._replicas):
            for task in self._work.pop(gone).running:
                task.cancel()
        for replica in self._replicas:
            work = self._work.setdefault(replica, _Work())
            work.others = self._versions()
            for number, (id, (version, result)) in enumerate(list(work.results.items())):
                if self._registry.find(id) != version.version:
                    del work.results[id]
                    work.fetched_bytes -= result.fetched_bytes or 0
                if number % LOOK_AT == 0:
                    await asyncio.sleep(0)
            self._start(replica, work)

    def _versions(self) -> Iterator[AdapterReference]:
        """Those that may be fetched, by name."""
        for _, meant in self._registry.content.lines:
            if not isinstance(meant, AdapterReference) or not isinstance(meant.origin, AdapterReference):
                continue
            if meant.version is not None and not meant.version.fault:
                yield meant

    def _start(self, replica: Replica, work: _Work) -> None:
        for _ in range(AT_A_TIME - len(work.running)):
            task = asyncio.create_task(self._fetch_due(replica, work))
            work.running.add(task)
            task.add_done_callback(work.running.discard)

    async def _fetch_due(self, replica: Replica, work: _Work) -> None:
        while True:
            await self._replicas.changes.until(lambda: replica.accepting and not replica.adapters.fetching())
            if work.fetched_bytes >= self._most:
                return await self._leave(work)
            version = await self._next(work)
            if version is None:
                return
            await self._fetch(replica, work, version)

    async def _next(self, work: _Work) -> AdapterReference | None:
        """The next version that is due."""
        if work.again:
            return work.again.popleft()
        for number, version in enumerate(work.others):
            if work.result(version) is None and not self._refusal(version):
                return version
            if number % LOOK_AT == 0:
                await asyncio.sleep(0)
        return None

    async def _leave(self, work: _Work) -> None:
        """Nothing more is fetched until there are other versions."""
        others, left = work.others, len(work.again)
        work.others = iter(())
        work.again.clear()
        for number, version in enumerate(others):
            left += work.result(version) is None and not self._refusal(version)
            if number % LOOK_AT == 0:
                await asyncio.sleep(0)
        if left:
            logger.warning(
                "%d registered adapters are not fetched before their first request: --adapter-prefetch-gib", left
            )

    async def _fetch(self, replica: Replica, work: _Work, version: AdapterReference) -> None:
        origin = version.origin
        assert isinstance(origin, AdapterReference)
        result = work.result(version) or Prefetched()
        work.results[version.id] = version, result
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
            if work.result(version) is result:  # it has not left meanwhile
                work.fetched_bytes += result.fetched_bytes

    def _try_again(self, replica: Replica, version: AdapterReference) -> None:
        work = self._work.get(replica)
        if work is not None and work.result(version) is not None:  # it has not left meanwhile
            work.again.append(version)
            self._start(replica, work)
