"""The listing of adapters: each once, with its state in every replica that has it."""

import asyncio
import heapq
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import AdapterNotFoundError, UnavailableError, quote
from loraplex_router.adapters.registry import COMMA, Registry
from loraplex_router.adapters.resolutions import Entry, Resolutions
from loraplex_router.replicas.pins import Pins
from loraplex_router.replicas.prefetching import Prefetching
from loraplex_router.replicas.replica import Replica
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.replicas.statuses import (
    hold,
    status_in_directory,
    status_in_memory,
    status_of_alias,
    status_on_disk,
    status_registered,
    status_while_fetched,
)
from loraplex_router.vocabulary.adapter import Adapter, Fetch, LocalAdapter
from loraplex_router.vocabulary.references import AdapterReference

NAMES_KEPT = 20  # times as long as listing them took, which is slow if there are thousands
AT_A_TIME = 500  # lines of a listing computed without a pause
LISTING_KEPT = 60.0  # seconds, for the pages after the first one

Fetches = Mapping[tuple[str, str, str], Fetch]  # by id, source and revision, as requested
NO_FETCHES: Fetches = {}
Line = tuple[tuple[str, str, str], Callable[[], pb.AdapterStatus | None]]  # (id, source, revision), and its status


class AdapterPage(NamedTuple):
    """A part of the listing."""

    adapters: list[pb.AdapterStatus]  # sorted by id
    more: bool  # whether there are others after it


class Listing:
    """Adapters are named by reference or by digest: merged ones have no reference."""

    def __init__(
        self, resolutions: Resolutions, replicas: Replicas, registry: Registry, prefetching: Prefetching, pins: Pins
    ) -> None:
        self._resolutions = resolutions
        self._replicas = replicas
        self._registry = registry
        self._prefetching = prefetching
        self._pins = pins
        self._listed: Sequence[LocalAdapter] = ()
        self._listed_at = -LISTING_KEPT
        self._names = frozenset[str]()
        self._named_until = 0.0
        self.dropping: set[tuple[str, str]] = set()  # (digest, id) pairs that are forgotten once nothing needs them

    async def page(
        self, visible: Callable[[str], bool] = lambda id: True, after: str = "", limit: int = 0
    ) -> AdapterPage:
        """Staged adapters under each requested name, adapters being staged, the registry, and the names in the adapter
        directory: the `visible` ids after the id `after`, and at least `limit`, if there are so many. 0: all of them.

        Adapters with the same id are never on two pages. Pages after the first one are of the same adapter directory.
        Raises UnavailableError if no replica can list the directory.
        """
        local, fetches = await self._local(kept=bool(after)), await self._fetches()
        lines = [*self._loaded(), *self._fetching(fetches)]
        known = {id for (id, source, _), _ in lines if source in ("", "local")}
        lines += self._registered(local, fetches, listed={id for (id, _, _), _ in lines})
        lines = [(key, make) for key, make in lines if key[0] > after and visible(self._registry.bare(key[0]))]
        on_disk: Iterator[Line] = (
            ((adapter.id, "local", ""), partial(status_on_disk, adapter, self._registry.has(adapter.id)))
            for adapter in islice(local, bisect_right(local, after, key=lambda adapter: adapter.id), None)
            if adapter.id not in known and visible(adapter.id)
        )
        page: list[pb.AdapterStatus] = []
        for key, make in heapq.merge(sorted(lines, key=itemgetter(0)), on_disk, key=itemgetter(0)):
            if limit and len(page) >= limit and page[-1].id != key[0]:
                return AdapterPage(page, True)
            if (status := make()) is not None:  # None: no replica holds it any more
                page.append(status)
            if len(page) % AT_A_TIME == 0:
                await asyncio.sleep(0)  # let other tasks run
        return AdapterPage(page, False)

    def _loaded(self) -> Iterator[Line]:
        names: dict[str, set[str]] = {}
        for entry in self._resolutions:
            names.setdefault(entry.digest, set()).add(entry.id)
        for entry in self._resolutions:
            if any(holders_of(self._replicas, entry.digest)):
                shared = len(names[entry.digest]) > 1
                yield (entry.id, entry.source, entry.revision), partial(self._status, entry, shared)

    async def _fetches(self) -> Fetches:
        """How far the fetches of all replicas are; of an adapter that several fetch, one of them."""
        asked = (replica.shards.fetches() for replica in self._replicas if replica.accepting)
        lists = await asyncio.gather(*asked, return_exceptions=True)
        found = [fetch for each in lists if not isinstance(each, BaseException) for fetch in each]
        return {(fetch.id, fetch.source, fetch.revision): fetch for fetch in found}

    def _fetching(self, fetches: Fetches = NO_FETCHES) -> Iterator[Line]:
        fetched = {reference for replica in self._replicas for reference in replica.adapters.fetching()}
        for reference in fetched:
            if isinstance(reference, AdapterReference) and not self._resolutions.digest(reference):
                key = reference.id, reference.source, reference.revision
                yield key, partial(status_while_fetched, reference, _fetch_of(reference, fetches))

    def _registered(
        self, local: Sequence[LocalAdapter] = (), fetches: Fetches = NO_FETCHES, listed: Container[str] = ()
    ) -> Iterator[Line]:
        on_disk = {adapter.id: adapter for adapter in local}
        for version in self._registry.versions():
            if version.id not in listed:
                key, origin = (version.id, version.origin.source, ""), version.origin
                if (fetch := _fetch_of(version, fetches)) is not None:
                    yield key, partial(status_while_fetched, version, fetch)
                elif origin.source in ("", "local") and origin.id in on_disk:
                    yield key, partial(status_in_directory, version, on_disk[origin.id])
                else:
                    yield key, partial(status_registered, version, self._prefetching.results(version))
        for name, targets in self._registry.aliases():
            yield (name, "", ""), partial(status_of_alias, name, targets)

    async def _local(self, kept: bool = False) -> Sequence[LocalAdapter]:
        """The names in the adapter directory, sorted; with `kept`, as they were a short while ago."""
        if kept and time.monotonic() - self._listed_at < LISTING_KEPT:
            return self._listed
        replica = next((replica for replica in self._replicas if replica.accepting), None)
        if replica is None:
            raise UnavailableError("no replica is ready: try again later")
        self._listed = await replica.shards.local_adapters()
        self._listed_at = time.monotonic()
        return self._listed

    async def lists(self, id: str) -> bool:
        """Whether `page` has this id."""
        named = ((key[0] for key, _ in lines()) for lines in (self._loaded, self._fetching, self._registered))
        return any(id in ids for ids in named) or await self.in_directory(id)

    async def in_directory(self, id: str) -> bool:
        """Whether the adapter directory has this name, as of a short while ago."""
        local = await self._local(kept=True)
        place = bisect_left(local, id, key=lambda adapter: adapter.id)
        return place < len(local) and local[place].id == id

    async def names(self) -> frozenset[str]:
        """The names of available adapters, except merged ones, and those on the hub and in object stores that were
        never requested. May be some seconds old, or older if there are many."""
        began = time.monotonic()
        if began >= self._named_until:
            local = await self._local()
            listed = (id for (id, _, _), _ in (*self._loaded(), *self._fetching(), *self._registered()))
            known = {id for id in listed if COMMA not in id}
            self._names = frozenset(known.union(adapter.id for adapter in local if not adapter.fault))
            now = time.monotonic()
            self._named_until = now + NAMES_KEPT * (now - began)
        return self._names

    def status(self, name: AdapterReference | str) -> pb.AdapterStatus:
        """As listed. Raises AdapterNotFoundError if it is not loaded."""
        if isinstance(name, AdapterReference):
            entry = self._resolutions.entry(name)
        else:
            entry = next((entry for entry in self._resolutions if entry.digest == name), None)
        status = self._status(entry, len(self._resolutions.names(entry.digest)) > 1) if entry else None
        if status is None:
            raise AdapterNotFoundError(f"adapter {shown(name)} is not loaded")
        return status

    def _status(self, entry: Entry, shared: bool) -> pb.AdapterStatus | None:
        """None if no replica holds it any more. `shared`: its content has other names, too."""
        pinned, name = self._pins.has(entry.digest, entry.id), entry.id if shared else None
        holders = [
            hold(replica, adapter, name, pinned) for replica, adapter in holders_of(self._replicas, entry.digest)
        ]
        return status_in_memory(entry, holders, (entry.digest, entry.id) in self.dropping) if holders else None


def holders_of(replicas: Replicas, digest: str) -> Iterator[tuple[Replica, Adapter]]:
    """The replicas that have content in memory, and what each knows of it."""
    for replica in replicas:
        if adapter := replica.pool.get(digest):
            yield replica, adapter


def _fetch_of(reference: AdapterReference, fetches: Fetches) -> Fetch | None:
    origin = reference.origin
    return fetches.get((origin.id, origin.source, origin.revision))


def shown(name: AdapterReference | str) -> str:
    """A reference or digest, as errors show it."""
    return quote(name if isinstance(name, str) else name.id)
