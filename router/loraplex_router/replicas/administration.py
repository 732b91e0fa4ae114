"""Operators' calls: listing adapters, loading them in advance, unloading them, and pinning them to the device.

A listing has each adapter once, with its state in every replica that has it.
"""

import asyncio
import heapq
import logging
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    InvalidRequestError,
    LoraplexError,
    UnavailableError,
    quote,
)
from loraplex_router.adapters.registry import AT, Registry
from loraplex_router.adapters.resolutions import Entry, Resolutions
from loraplex_router.engine.output import Generation
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
from loraplex_router.vocabulary.references import AdapterReference, ids_of

NAMES_KEPT = 20  # times as long as listing them took, which is slow if there are thousands
AT_A_TIME = 500  # lines of a listing computed without a pause
LISTING_KEPT = 60.0  # seconds, for the pages after the first one

Fetches = Mapping[tuple[str, str, str], Fetch]  # by id, source and revision, as requested
NO_FETCHES: Fetches = {}
Line = tuple[tuple[str, str, str], Callable[[], pb.AdapterStatus | None]]  # (id, source, revision), and its status

logger = logging.getLogger(__name__)


class AdapterPage(NamedTuple):
    """A part of the listing."""

    adapters: list[pb.AdapterStatus]  # sorted by id
    more: bool  # whether there are others after it


class Administration:
    """Adapters are named by reference or by digest: merged ones have no reference."""

    def __init__(
        self, resolutions: Resolutions, replicas: Replicas, registry: Registry, prefetching: Prefetching
    ) -> None:
        self.registry = registry
        self._prefetching = prefetching
        self._resolutions = resolutions
        self._replicas = replicas
        self._working = set[asyncio.Task[None]]()
        self._listed: Sequence[LocalAdapter] = ()
        self._listed_at = -LISTING_KEPT
        self._names = frozenset[str]()
        self._named_until = 0.0
        self._dropping: set[tuple[str, str]] = set()  # (digest, id) pairs to forget once nothing needs them
        self._pins = Pins()

    async def list(
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
        lines = [(key, make) for key, make in lines if key[0] > after and visible(self.registry.bare(key[0]))]
        on_disk: Iterator[Line] = (
            ((adapter.id, "local", ""), partial(status_on_disk, adapter, self.registry.has(adapter.id)))
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
            if any(self._holders(entry.digest)):
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
        for version in self.registry.versions():
            if version.id not in listed:
                key, origin = (version.id, version.origin.source, ""), version.origin
                if (fetch := _fetch_of(version, fetches)) is not None:
                    yield key, partial(status_while_fetched, version, fetch)
                elif origin.source in ("", "local") and origin.id in on_disk:
                    yield key, partial(status_in_directory, version, on_disk[origin.id])
                else:
                    yield key, partial(status_registered, version, self._prefetching.results(version))
        for name, targets in self.registry.aliases():
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
        """Whether `list` has this id."""
        named = ((key[0] for key, _ in lines()) for lines in (self._loaded, self._fetching, self._registered))
        return any(id in ids for ids in named) or await self.in_directory(id)

    async def in_directory(self, id: str) -> bool:
        """Whether the adapter directory has this name, as of a short while ago."""
        local = await self._local(kept=True)
        place = bisect_left(local, id, key=lambda adapter: adapter.id)
        return place < len(local) and local[place].id == id

    async def load(self, reference: AdapterReference) -> pb.AdapterStatus:
        """Rereads the source and stages its current content, on one replica."""
        await self._replicas.choose(reference).adapters.read_again(reference)
        return self.status(reference)

    async def stage(self, reference: AdapterReference) -> Entry:
        """Stages an adapter on one replica. Returns what it was resolved to."""
        with await self._replicas.place(reference):
            entry = self._resolutions.entry(reference)
        assert entry is not None
        return entry

    async def names(self) -> frozenset[str]:
        """The names of available adapters, except those on the hub and in object stores that were never requested. May
        be some seconds old, or older if there are many."""
        began = time.monotonic()
        if began >= self._named_until:
            local = await self._local()
            known = {id for (id, _, _), _ in (*self._loaded(), *self._fetching(), *self._registered())}
            self._names = frozenset(known.union(adapter.id for adapter in local if not adapter.fault))
            now = time.monotonic()
            self._named_until = now + NAMES_KEPT * (now - began)
        return self._names

    async def unload(self, name: AdapterReference | str, wait: bool) -> None:
        """Forgets what its references were resolved to, and frees its memory on every replica. Content that also has
        another name stays, under that name.

        With `wait`, waits until sequences that use it have ended. Raises AdapterNotFoundError if it is not loaded and,
        without `wait`, AdapterInUseError if sequences use it.
        """
        digest = self._digest(name)
        holders = list(self._holders(digest))
        if not holders:
            raise AdapterNotFoundError(f"adapter {_shown(name)} is not loaded")
        shared = name if isinstance(name, AdapterReference) and self._resolutions.names(digest) != {name.id} else None
        wanted = bool(self._asked_for(shared)) if shared else any(adapter.wanted for _, adapter in holders)
        if wanted and not wait:
            raise AdapterInUseError(f"adapter {_shown(name)} is in use")
        if shared:
            await self._drop_name(digest, shared)
            return
        self._pins.remove(digest)
        await asyncio.gather(*(replica.adapters.unload(adapter) for replica, adapter in holders))
        if not any(self._holders(digest)):
            self._resolutions.forget(digest)

    def retire(self, version: AdapterReference) -> None:
        """Has a version that the registry no longer has leave memory, once the sequences that use it have ended."""
        self.follow_pins()
        self._begin(self._retire(version))

    def follow_pins(self) -> None:
        """Has pins move with registered names and aliases to the versions that these mean now."""
        for digest, pinned in self._pins.named():
            name = pinned.asked
            if name and AT not in name and self.registry.has(name):
                with suppress(InvalidRequestError):  # an alias that now stands for several
                    now = self.registry.resolve_one(AdapterReference(name, token=pinned.token), None)
                    if now.id != pinned.id:
                        self._unpin(digest, pinned.id)
                        self._begin(self._pin_again(now.id, now))

    async def _pin_again(self, shown: str, reference: AdapterReference) -> None:
        try:
            await self.pin(reference)
        except LoraplexError as error:
            logger.warning("cannot reload the pinned adapter %s: %s", shown, error)

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _retire(self, version: AdapterReference) -> None:
        if (digest := self._resolutions.digest(version)) is not None:
            with suppress(AdapterNotFoundError, UnavailableError):  # it has left by itself, or with its replica
                await self.unload(version, wait=True)
            self._resolutions.forget(digest, version.id)

    async def pin(self, name: AdapterReference | str) -> pb.AdapterStatus:
        """Loads it onto one replica's device and keeps it there. Returns once it is there. If named by reference, it is
        pinned on another replica when that one is lost.

        Raises AdapterNotFoundError for a digest that is not loaded, AdapterPinsError if the replica cannot pin another
        one.
        """
        if isinstance(name, AdapterReference):
            with await self._replicas.place(name) as lease:
                replica, adapter = lease.replica, lease.adapter
        else:
            holders = [holder for holder in self._holders(name) if not holder[1].leaving]
            if not holders:
                raise AdapterNotFoundError(f"adapter {_shown(name)} is not loaded")
            replica, adapter = max(holders, key=lambda holder: (holder[1].pinned, holder[1].ready))
        replica.pool.pin(adapter)
        self._pins.add(adapter.digest, name)
        replica.engine.wake()
        await self._replicas.changes.until(lambda: adapter.ready or not (adapter.pinned and replica.accepting))
        if adapter.pinned and not adapter.ready:
            raise UnavailableError("the replica was lost")
        if not adapter.ready and self._pins.has(adapter.digest, name.id if isinstance(name, AdapterReference) else ""):
            self._pins.remove(adapter.digest)
            raise UnavailableError("it cannot be loaded onto the device, so it is not pinned; the log says why")
        return self.status(name)

    def unpin(self, name: AdapterReference | str) -> pb.AdapterStatus:
        """Content that is pinned under another name as well stays pinned under that. Raises AdapterNotFoundError if it
        is not loaded."""
        digest = self._digest(name)
        self._unpin(digest, *((name.id, "") if isinstance(name, AdapterReference) else ()))
        self._replicas.changes.notify()
        return self.status(name)

    def _unpin(self, digest: str, *ids: str) -> None:
        if self._pins.remove(digest, *ids):
            for replica, adapter in self._holders(digest):
                replica.pool.unpin(adapter)

    async def restore_pins(self) -> None:
        """Pins the adapters of lost replicas again, on others."""
        for digest, reference in list(self._pins):
            if not any(adapter.pinned for _, adapter in self._holders(digest)):
                await self._pin_again(digest, reference)

    def _digest(self, name: AdapterReference | str) -> str:
        digest = name if isinstance(name, str) else self._resolutions.digest(name)
        if digest is None:
            raise AdapterNotFoundError(f"adapter {_shown(name)} is not loaded")
        return digest

    def _holders(self, digest: str) -> Iterator[tuple[Replica, Adapter]]:
        for replica in self._replicas:
            if adapter := replica.pool.get(digest):
                yield replica, adapter

    def status(self, name: AdapterReference | str) -> pb.AdapterStatus:
        """As listed. Raises AdapterNotFoundError if it is not loaded."""
        if isinstance(name, AdapterReference):
            entry = self._resolutions.entry(name)
        else:
            entry = next((entry for entry in self._resolutions if entry.digest == name), None)
        status = self._status(entry, len(self._resolutions.names(entry.digest)) > 1) if entry else None
        if status is None:
            raise AdapterNotFoundError(f"adapter {_shown(name)} is not loaded")
        return status

    def _asked_for(self, reference: AdapterReference) -> tuple[Generation, ...]:
        """The waiting or running generations that requested it by this name."""
        generations = (generation for replica in self._replicas for generation in replica.engine.generations)
        return tuple(each for each in generations if ids_of(each.reference) == (reference.id,))

    def _status(self, entry: Entry, shared: bool) -> pb.AdapterStatus | None:
        """None if no replica holds it any more. `shared`: its content has other names, too."""
        pinned, name = self._pins.has(entry.digest, entry.id), entry.id if shared else None
        holders = [hold(replica, adapter, name, pinned) for replica, adapter in self._holders(entry.digest)]
        return status_in_memory(entry, holders, (entry.digest, entry.id) in self._dropping) if holders else None

    async def _drop_name(self, digest: str, reference: AdapterReference) -> None:
        """Forgets this name only: the content stays, under its other names."""
        id, asked = reference.id, self._asked_for(reference)
        self._dropping.add((digest, id))
        try:
            await self._replicas.changes.until(lambda: all(generation.finished for generation in asked))
        finally:
            self._dropping.discard((digest, id))
        self._resolutions.forget(digest, id)
        for _, adapter in self._holders(digest):
            adapter.names.discard(id)
        self._unpin(digest, id)


def _fetch_of(reference: AdapterReference, fetches: Fetches) -> Fetch | None:
    origin = reference.origin
    return fetches.get((origin.id, origin.source, origin.revision))


def _shown(name: AdapterReference | str) -> str:
    return quote(name if isinstance(name, str) else name.id)
