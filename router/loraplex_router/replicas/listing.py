"""The listing of adapters: each once, with its state in every replica that has it."""

import asyncio
import heapq
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from operator import attrgetter, itemgetter
from typing import NamedTuple, TypeVar

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import AdapterNotFoundError, UnavailableError, quote
from loraplex_router.access.tenant import Allowance, Tenant
from loraplex_router.adapters.registry import ADMINISTRATORS_SEE, COMMA, Registry
from loraplex_router.adapters.registry import Line as Declared
from loraplex_router.adapters.resolutions import Entry, Resolutions
from loraplex_router.adapters.staging import HUB
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
from loraplex_router.vocabulary.references import AdapterReference, Reference

NAMES_KEPT = 20  # times as long as listing them took, which is slow if there are thousands
AT_A_TIME = 100  # lines of a listing computed without a pause
LISTING_KEPT = 60.0  # seconds, for the pages after the first one
ADMINISTRATOR = Tenant("", Allowance(admin=True))  # who may see everything

T = TypeVar("T")
Fetches = Mapping[tuple[str, str, str], Fetch]  # by id, source and revision, as requested
NO_FETCHES: Fetches = {}


class Line(NamedTuple):
    key: tuple[str, str, str]  # id, source and revision
    permitted: str  # the name that a tenant must be allowed to use
    status: Callable[[], pb.AdapterStatus | None]
    known_to: Collection[str] | None = None  # the tenants that alone know of it; None: all do
    origin: str = ""  # the id of what a registered name stands for

    @property
    def id(self) -> str:
        return self.key[0]


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
        self._listing = asyncio.Lock()
        self._next_listing: asyncio.Task[Sequence[LocalAdapter]] | None = None  # which has not begun
        self._names: Mapping[str, Collection[str] | None] = {}
        self._named_until = 0.0
        self._naming: asyncio.Task[None] | None = None
        self.dropping: set[tuple[str, str]] = set()  # (digest, id) pairs that are forgotten once nothing needs them

    async def page(
        self, tenant: Tenant = ADMINISTRATOR, after: str = "", limit: int = 0, only: str = ""
    ) -> AdapterPage:
        """Staged adapters under each requested name, adapters being staged, the registry, and the names in the adapter
        directory, as far as the tenant may see them: those after the id `after`, and at least `limit`, if there are so
        many. 0: all of them. `only`: those with this id.

        Adapters with the same id are never on two pages. Pages after the first one are of the same adapter directory.
        Raises UnavailableError if no replica can list the directory.
        """
        local, fetches = await self._local(kept=bool(after)), await self._fetches()
        several = self._staged(tenant, fetches)
        listed = {line.id for line in several}
        known = {line.id for line in several if line.key[1] in ("", "local")}
        several += self._registered(self._registry.upload_lines(), local, fetches, listed)
        declared = self._registry.content.lines
        lines = heapq.merge(
            sorted((line for line in several if line.id > after), key=attrgetter("key")),
            self._registered(_part(declared, itemgetter(0), after, only), local, fetches, listed),
            self._in_directory(_part(local, attrgetter("id"), after, only), known),
            key=attrgetter("id"),
        )
        page: list[pb.AdapterStatus] = []
        for number, line in enumerate(lines):
            if number % AT_A_TIME == 0:
                await asyncio.sleep(0)  # let other tasks run
            if only not in ("", line.id) or not tenant.may_use(line.permitted):
                continue
            if limit and len(page) >= limit and page[-1].id != line.id:
                return AdapterPage(page, True)
            if (status := line.status()) is not None:  # None: no replica holds it any more
                if status.reason and line.origin and not tenant.may_know(line.origin):
                    status.reason = ADMINISTRATORS_SEE
                page.append(status)
        return AdapterPage(page, False)

    def _staged(self, tenant: Tenant, fetches: Fetches = NO_FETCHES) -> list[Line]:
        """Those in memory, or on their way there, that the tenant knows of."""
        lines = *self._loaded(tenant), *self._fetching(fetches)
        return [line for line in lines if line.known_to is None or tenant.may_see(line.permitted, line.known_to)]

    def _loaded(self, tenant: Tenant = ADMINISTRATOR) -> Iterator[Line]:
        held = {adapter.digest for replica in self._replicas for adapter in replica.pool}
        entries: dict[str, list[Entry]] = {}
        for entry in self._resolutions:
            if entry.digest in held:
                entries.setdefault(entry.digest, []).append(entry)
        for of_content in entries.values():
            shared = len({entry.id for entry in of_content}) > 1
            hidden = {
                entry.id
                for entry in of_content
                if shared and not tenant.may_see(self._registry.bare(entry.id), entry.known_to)
            }
            for entry in of_content:
                key, private = (entry.id, entry.source, entry.revision), bool(hidden - {entry.id})
                make = partial(self._status, entry, shared, private)
                yield Line(key, self._registry.bare(entry.id), make, entry.known_to)

    async def _fetches(self) -> Fetches:
        """How far the fetches of all replicas are; of an adapter that several fetch, one of them."""
        asked = (replica.shards.fetches() for replica in self._replicas if replica.accepting)
        lists = await asyncio.gather(*asked, return_exceptions=True)
        found = [fetch for each in lists if not isinstance(each, BaseException) for fetch in each]
        return {(fetch.id, fetch.source, fetch.revision): fetch for fetch in found}

    def _fetching(self, fetches: Fetches = NO_FETCHES) -> Iterator[Line]:
        tenants: dict[Reference, set[str]] = {}
        for replica in self._replicas:
            for fetching in replica.adapters.fetching():
                tenants.setdefault(fetching.reference, set()).update(fetching.tenants)
        for reference, waiting in tenants.items():
            if isinstance(reference, AdapterReference) and not self._resolutions.digest(reference):
                key = reference.id, reference.source, reference.revision
                make = partial(status_while_fetched, reference, _fetch_of(reference, fetches))
                known_to = waiting if reference.token and reference.origin.source in ("", HUB) else None
                origin = reference.origin.id if reference.version is not None else ""
                yield Line(key, self._registry.bare(reference.id), make, known_to, origin)

    def _registered(
        self, declared: Iterable[Declared], local: Sequence[LocalAdapter], fetches: Fetches, listed: Container[str]
    ) -> Iterator[Line]:
        for id, meant in declared:
            if not isinstance(meant, AdapterReference):
                yield Line((id, "", ""), id, partial(status_of_alias, id, meant))
            elif id not in listed:
                make = partial(self._status_registered, meant, local, fetches)
                yield Line((id, meant.origin.source, ""), self._registry.bare(id), make, origin=meant.origin.id)

    def _status_registered(
        self, version: AdapterReference, local: Sequence[LocalAdapter], fetches: Fetches
    ) -> pb.AdapterStatus:
        if (fetch := _fetch_of(version, fetches)) is not None:
            return status_while_fetched(version, fetch)
        assert version.version is not None
        from_directory = not version.version.fault and version.origin.source in ("", "local")
        if from_directory and (found := _find(local, version.origin.id)) is not None:
            return status_in_directory(version, found)
        return status_registered(version, self._prefetching.results(version))

    def _in_directory(self, local: Iterable[LocalAdapter], known: Container[str]) -> Iterator[Line]:
        for adapter in local:
            if adapter.id not in known:
                make = partial(status_on_disk, adapter, self._registry.has(adapter.id))
                yield Line((adapter.id, "local", ""), adapter.id, make)

    async def _local(self, kept: bool = False) -> Sequence[LocalAdapter]:
        """The names in the adapter directory, sorted; with `kept`, as they were a short while ago."""
        if kept and time.monotonic() - self._listed_at < LISTING_KEPT:
            return self._listed
        if self._next_listing is None:
            self._next_listing = asyncio.create_task(self._list_directory())
        return await asyncio.shield(self._next_listing)

    async def _list_directory(self) -> Sequence[LocalAdapter]:
        """One at a time. Those who ask meanwhile wait for the next one together, since the directory may have changed
        after this one has begun."""
        async with self._listing:
            self._next_listing = None
            replica = next((replica for replica in self._replicas if replica.accepting), None)
            if replica is None:
                raise UnavailableError("no replica is ready: try again later")
            self._listed = await replica.shards.local_adapters()
            self._listed_at = time.monotonic()
            return self._listed

    async def lists(self, id: str, tenant: Tenant) -> bool:
        """Whether `page` has this id."""
        if not tenant.may_use(self._registry.bare(id)):
            return False
        staged = any(line.id == id for line in self._staged(tenant))
        return staged or self._registry.lists(id) or await self.in_directory(id)

    async def in_directory(self, id: str) -> bool:
        """Whether the adapter directory has this name, as of a short while ago."""
        return _find(await self._local(kept=True), id) is not None

    async def names(self) -> Mapping[str, Collection[str] | None]:
        """The names of available adapters, except merged ones, and those on the hub and in object stores that were
        never requested. With the tenants that alone know of each; None: all do. May be some seconds old, or older if
        there are many. Those who ask while they are listed wait for the same listing."""
        if time.monotonic() >= self._named_until:
            if self._naming is None or self._naming.done():
                self._naming = asyncio.create_task(self._list_names())
            await asyncio.shield(self._naming)
        return self._names

    async def _list_names(self) -> None:
        began = time.monotonic()
        local = await self._local()
        names: dict[str, Collection[str] | None] = {}
        for line in (*self._loaded(), *self._fetching()):
            if COMMA not in line.id:
                known_to = names.get(line.id, ())
                if known_to is None or line.known_to is None:
                    names[line.id] = None
                else:
                    names[line.id] = {*known_to, *line.known_to}
        names |= dict.fromkeys(id for id, _ in (*self._registry.content.lines, *self._registry.upload_lines()))
        self._names = names | dict.fromkeys(adapter.id for adapter in local if not adapter.fault)
        now = time.monotonic()
        self._named_until = now + NAMES_KEPT * (now - began)

    def status(self, name: AdapterReference | str) -> pb.AdapterStatus:
        """As listed. Raises AdapterNotFoundError if it is not loaded."""
        if isinstance(name, AdapterReference):
            entry = self._resolutions.entry(name)
        else:
            entry = next(iter(self._resolutions.of(name)), None)
        status = self._status(entry, len(self._resolutions.names(entry.digest)) > 1) if entry else None
        if status is None:
            raise AdapterNotFoundError(f"adapter {shown(name)} is not loaded")
        return status

    def _status(self, entry: Entry, shared: bool, private: bool = False) -> pb.AdapterStatus | None:
        """None if no replica holds it any more. `shared`: its content has other names, too. `private`: the caller does
        not see them all."""
        pinned, name = self._pins.has(entry.digest, entry.id), entry.id if shared else None
        holders = [
            hold(replica, adapter, name, pinned) for replica, adapter in holders_of(self._replicas, entry.digest)
        ]
        status = status_in_memory(entry, holders, (entry.digest, entry.id) in self.dropping) if holders else None
        if status is not None and private:  # its content may have been used by another name
            status.ClearField("last_used")
        return status


def holders_of(replicas: Replicas, digest: str) -> Iterator[tuple[Replica, Adapter]]:
    """The replicas that have content in memory, and what each knows of it."""
    for replica in replicas:
        if adapter := replica.pool.get(digest):
            yield replica, adapter


def _part(lines: Sequence[T], id_of: Callable[[T], str], after: str, only: str) -> Iterator[T]:
    """Of lines sorted by id, those after an id, if there is one; with `only`, those with this id."""
    start = bisect_right(lines, after, key=id_of) if after else 0
    if not only:
        return islice(lines, start, None)
    return islice(lines, max(start, bisect_left(lines, only, key=id_of)), bisect_right(lines, only, key=id_of))


def _find(local: Sequence[LocalAdapter], id: str) -> LocalAdapter | None:
    """The one with this name, of those that are sorted."""
    place = bisect_left(local, id, key=attrgetter("id"))
    return local[place] if place < len(local) and local[place].id == id else None


def _fetch_of(reference: AdapterReference, fetches: Fetches) -> Fetch | None:
    origin = reference.origin
    return fetches.get((origin.id, origin.source, origin.revision))


def shown(name: AdapterReference | str) -> str:
    """A reference or digest, as errors show it."""
    return quote(name if isinstance(name, str) else name.id)
