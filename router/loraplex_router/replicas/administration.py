"""Operators' calls: loading adapters in advance, unloading them, and pinning them to the device."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    LoraplexError,
    UnavailableError,
)
from loraplex_router.adapters.registry import AT, Registry
from loraplex_router.adapters.resolutions import Entry, Resolutions
from loraplex_router.engine.generation import Generation
from loraplex_router.replicas.listing import Listing, holders_of, shown
from loraplex_router.replicas.pins import Pins
from loraplex_router.replicas.prefetching import Prefetching
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.vocabulary.references import AdapterReference, ids_of

logger = logging.getLogger(__name__)


class Administration:
    """Adapters are named by reference or by digest: merged ones have no reference."""

    def __init__(
        self, resolutions: Resolutions, replicas: Replicas, registry: Registry, prefetching: Prefetching
    ) -> None:
        self.registry = registry
        self._resolutions = resolutions
        self._replicas = replicas
        self._working = set[asyncio.Task[None]]()
        self._pins = Pins()
        self.listing = Listing(resolutions, replicas, registry, prefetching, self._pins)

    async def load(self, reference: AdapterReference) -> pb.AdapterStatus:
        """Rereads the source and stages its current content, on one replica."""
        await self._replicas.choose(reference).adapters.read_again(reference)
        return self.loaded(reference)

    def loaded(self, name: AdapterReference | str) -> pb.AdapterStatus:
        """The status of what was just loaded. Raises UnavailableError if its replica was lost meanwhile."""
        try:
            return self.listing.status(name)
        except AdapterNotFoundError as error:
            raise UnavailableError("the replica that had loaded it was lost: send the request again") from error

    async def stage(self, reference: AdapterReference) -> Entry:
        """Stages an adapter on one replica. Returns what it was resolved to."""
        with await self._replicas.place(reference):
            entry = self._resolutions.entry(reference)
        assert entry is not None
        return entry

    async def unload(self, name: AdapterReference | str, wait: bool) -> None:
        """Forgets what its references were resolved to, and frees its memory on every replica. Content that also has
        another name stays, under that name.

        With `wait`, waits until sequences that use it have ended. Raises AdapterNotFoundError if it is not loaded and,
        without `wait`, AdapterInUseError if sequences use it.
        """
        digest = self._digest(name)
        holders = list(holders_of(self._replicas, digest))
        if not holders:
            raise AdapterNotFoundError(f"adapter {shown(name)} is not loaded")
        shared = name if isinstance(name, AdapterReference) and self._resolutions.names(digest) != {name.id} else None
        wanted = bool(self._asked_for(shared)) if shared else any(adapter.wanted for _, adapter in holders)
        if wanted and not wait:
            raise AdapterInUseError(f"adapter {shown(name)} is in use")
        if shared:
            await self._drop_name(digest, shared)
            return
        self._pins.remove(digest)
        await asyncio.gather(*(replica.adapters.unload(adapter) for replica, adapter in holders))
        if not any(holders_of(self._replicas, digest)):
            self._resolutions.forget(digest)

    def retire(self, version: AdapterReference) -> None:
        """Has a version that the registry no longer has leave memory, once the sequences that use it have ended."""
        self.follow_pins()
        self._begin(self._retire(version))

    def follow_pins(self) -> None:
        """Has pins move with registered names and aliases to the versions that these mean now."""
        for digest, pinned in self._pins.named():
            if self._moves(pinned):
                with suppress(LoraplexError):  # it stands for several now, or for a version that cannot be served
                    now = self.registry.resolve_one(AdapterReference(pinned.asked, token=pinned.token), None)
                    if now.id != pinned.id or not digest:
                        self._unpin(digest, pinned.id)
                        self._begin(self._follow(now))

    def _moves(self, pinned: AdapterReference) -> bool:
        """Whether the name under which it was pinned may stand for another version now."""
        return bool(pinned.asked) and AT not in pinned.asked and self.registry.has(pinned.asked)

    async def _follow(self, reference: AdapterReference) -> None:
        if not await self._pin_again(reference.id, reference):
            self._pins.add("", reference)

    async def _pin_again(self, name: str, reference: AdapterReference) -> bool:
        try:
            await self.pin(reference)
        except LoraplexError as error:
            logger.warning("cannot reload the pinned adapter %s: %s", name, error)
            return False
        return True

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _retire(self, version: AdapterReference) -> None:
        if (digest := self._resolutions.digest(version)) is not None:
            pinned = [name for held, name in self._pins.named() if (held, name.id) == (digest, version.id)]
            with suppress(AdapterNotFoundError, UnavailableError):  # it has left by itself, or with its replica
                await self.unload(version, wait=True)
            for name in filter(self._moves, pinned):  # to what it stands for, once that can be served
                self._pins.remove(digest, name.id)
                self._pins.add("", name)
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
            if adapter.leaving:  # others hold it still
                await replica.adapters.unload(adapter)
                return await self.pin(name)
        else:
            holders = [holder for holder in holders_of(self._replicas, name) if not holder[1].leaving]
            if not holders:
                raise AdapterNotFoundError(f"adapter {shown(name)} is not loaded")
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
        return self.loaded(name)

    def unpin(self, name: AdapterReference | str) -> pb.AdapterStatus:
        """Content that is pinned under another name as well stays pinned under that. Raises AdapterNotFoundError if it
        is not loaded."""
        digest = self._digest(name)
        self._unpin(digest, *((name.id, "") if isinstance(name, AdapterReference) else ()))
        self._replicas.changes.notify()
        return self.listing.status(name)

    def _unpin(self, digest: str, *ids: str) -> None:
        if self._pins.remove(digest, *ids) and digest:
            for replica, adapter in holders_of(self._replicas, digest):
                replica.pool.unpin(adapter)

    async def restore_pins(self) -> None:
        """Pins the adapters of lost replicas again, on others."""
        for digest, reference in list(self._pins):
            if not any(adapter.pinned for _, adapter in holders_of(self._replicas, digest)):
                await self._pin_again(digest, reference)

    def _digest(self, name: AdapterReference | str) -> str:
        digest = name if isinstance(name, str) else self._resolutions.digest(name)
        if digest is None:
            raise AdapterNotFoundError(f"adapter {shown(name)} is not loaded")
        return digest

    def _asked_for(self, reference: AdapterReference) -> tuple[Generation, ...]:
        """The waiting or running generations that requested it by this name."""
        generations = (generation for replica in self._replicas for generation in replica.engine.generations)
        return tuple(each for each in generations if ids_of(each.reference) == (reference.id,))

    async def _drop_name(self, digest: str, reference: AdapterReference) -> None:
        """Forgets this name only: the content stays, under its other names."""
        id, asked = reference.id, self._asked_for(reference)
        self.listing.dropping.add((digest, id))
        try:
            await self._replicas.changes.until(lambda: all(generation.finished for generation in asked))
        finally:
            self.listing.dropping.discard((digest, id))
        self._resolutions.forget(digest, id)
        for _, adapter in holders_of(self._replicas, digest):
            adapter.names.discard(id)
        self._unpin(digest, id)
