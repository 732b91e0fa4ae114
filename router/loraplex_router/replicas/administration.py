"""Operators' calls: listing adapters, loading them in advance, unloading them, and pinning them to the device.

A listing has each adapter once, with its state in every replica that has it.
"""

import asyncio
import logging
import time
from collections.abc import Iterator

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterPinsError,
    LoraplexError,
    UnavailableError,
    quote,
)
from loraplex_router.adapters.registry import AdapterRegistry, Entry
from loraplex_router.engine.output import Generation
from loraplex_router.replicas.replica import Replica
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.replicas.statuses import status_in_memory, status_on_disk, status_while_fetched
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.references import AdapterReference, ids_of

NAMES_KEPT = 20  # times as long as listing them took, which is slow if there are thousands
AT_A_TIME = 500  # lines of a listing computed without a pause

logger = logging.getLogger(__name__)


class Administration:
    """Adapters are named by reference or by digest: merged ones have no reference."""

    def __init__(self, registry: AdapterRegistry, replicas: Replicas) -> None:
        self._registry = registry
        self._replicas = replicas
        self._names = frozenset[str]()
        self._named_until = 0.0
        self._dropping: set[tuple[str, str]] = set()  # (digest, id) pairs to forget once nothing needs them
        self._pins: dict[str, AdapterReference] = {}  # by digest; outlives the replica that holds the adapter

    async def list(self) -> list[pb.AdapterStatus]:
        """Staged adapters under each requested name, adapters being staged, and the names in the adapter directory.
        Raises UnavailableError if no replica can list the directory."""
        loaded = [status for entry in self._registry if (status := self._status(entry))]
        fetched = {reference for replica in self._replicas for reference in replica.adapters.fetching()}
        fetching = [
            status_while_fetched(reference)
            for reference in fetched
            if isinstance(reference, AdapterReference) and not self._registry.digest(reference)
        ]
        known = {status.id for status in (*loaded, *fetching) if status.source in ("", "local")}
        replica = next((replica for replica in self._replicas if replica.accepting), None)
        if replica is None:
            raise UnavailableError("no replica is ready: try again later")
        local = await replica.shards.local_adapters()
        on_disk: list[pb.AdapterStatus] = []
        for start in range(0, len(local), AT_A_TIME):
            await asyncio.sleep(0)  # let other tasks run
            on_disk += [
                status_on_disk(adapter) for adapter in local[start : start + AT_A_TIME] if adapter.id not in known
            ]
        listed = [*loaded, *fetching, *on_disk]
        return sorted(listed, key=lambda status: (status.id, status.source, status.revision))

    async def load(self, reference: AdapterReference) -> pb.AdapterStatus:
        """Rereads the source and stages its current content, on one replica."""
        await self._replicas.choose(reference).adapters.read_again(reference)
        return self._status_of(reference)

    async def names(self) -> frozenset[str]:
        """The names of available adapters, except those on the hub and in object stores that were never requested. May
        be some seconds old, or older if there are many."""
        began = time.monotonic()
        if began >= self._named_until:
            listed = await self.list()
            self._names = frozenset(status.id for status in listed if status.state != pb.ADAPTER_STATE_BROKEN)
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
        shared = name if isinstance(name, AdapterReference) and self._registry.names(digest) != {name.id} else None
        wanted = bool(self._asked_for(shared)) if shared else any(adapter.wanted for _, adapter in holders)
        if wanted and not wait:
            raise AdapterInUseError(f"adapter {_shown(name)} is in use")
        if shared:
            await self._drop_name(digest, shared)
            return
        self._pins.pop(digest, None)
        await asyncio.gather(*(replica.adapters.unload(adapter) for replica, adapter in holders))
        if not any(self._holders(digest)):
            self._registry.forget(digest)

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
        if not replica.pool.pin(adapter):
            raise AdapterPinsError(f"{replica.pool.slots - 1} adapters are pinned already; unpin one first")
        if isinstance(name, AdapterReference):
            self._pins[adapter.digest] = name
        replica.engine.wake()
        await self._replicas.changes.until(lambda: adapter.ready or not (adapter.pinned and replica.accepting))
        if adapter.pinned and not adapter.ready:
            raise UnavailableError("the replica was lost")
        return self._status_of(name)

    def unpin(self, name: AdapterReference | str) -> pb.AdapterStatus:
        """Raises AdapterNotFoundError if it is not loaded."""
        digest = self._digest(name)
        self._pins.pop(digest, None)
        for replica, adapter in self._holders(digest):
            replica.pool.unpin(adapter)
        self._replicas.changes.notify()
        return self._status_of(name)

    async def restore_pins(self) -> None:
        """Pins the adapters of lost replicas again, on others."""
        for digest, reference in list(self._pins.items()):
            if not any(adapter.pinned for _, adapter in self._holders(digest)):
                try:
                    await self.pin(reference)
                except LoraplexError as error:
                    logger.warning("cannot reload the pinned adapter %s: %s", digest, error)

    def _digest(self, name: AdapterReference | str) -> str:
        digest = name if isinstance(name, str) else self._registry.digest(name)
        if digest is None:
            raise AdapterNotFoundError(f"adapter {_shown(name)} is not loaded")
        return digest

    def _holders(self, digest: str) -> Iterator[tuple[Replica, Adapter]]:
        for replica in self._replicas:
            if adapter := replica.pool.get(digest):
                yield replica, adapter

    def _status_of(self, name: AdapterReference | str) -> pb.AdapterStatus:
        if isinstance(name, AdapterReference):
            entry = self._registry.entry(name)
        else:
            entry = next((entry for entry in self._registry if entry.digest == name), None)
        status = self._status(entry) if entry else None
        if status is None:
            raise AdapterNotFoundError(f"adapter {_shown(name)} is not loaded")
        return status

    def _asked_for(self, reference: AdapterReference) -> tuple[Generation, ...]:
        """The waiting or running generations that requested it by this name."""
        generations = (generation for replica in self._replicas for generation in replica.engine.generations)
        return tuple(each for each in generations if ids_of(each.reference) == (reference.id,))

    def _status(self, entry: Entry) -> pb.AdapterStatus | None:
        """None if no replica holds it any more."""
        holders = [(replica.name, adapter) for replica, adapter in self._holders(entry.digest)]
        return status_in_memory(entry, holders, (entry.digest, entry.id) in self._dropping) if holders else None

    async def _drop_name(self, digest: str, reference: AdapterReference) -> None:
        """Forgets this name only: the content stays, under its other names."""
        id, asked = reference.id, self._asked_for(reference)
        self._dropping.add((digest, id))
        try:
            await self._replicas.changes.until(lambda: all(generation.finished for generation in asked))
        finally:
            self._dropping.discard((digest, id))
        self._registry.forget(digest, id)
        pinned = self._pins.get(digest)
        for replica, adapter in self._holders(digest):
            adapter.names.discard(id)
            if pinned is not None and pinned.id == id:
                replica.pool.unpin(adapter)
        if pinned is not None and pinned.id == id:
            del self._pins[digest]


def _shown(name: AdapterReference | str) -> str:
    return quote(name if isinstance(name, str) else name.id)
