"""From what a request calls an adapter to its content, staged in the shards' host memory."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from enum import Enum
from hashlib import sha256

from loraplex_protos.errors import AdapterInUseError, AdapterNotFoundError
from loraplex_router.adapters.pool import Adapter, AdapterPool
from loraplex_router.request import AdapterReference, MergedReference
from loraplex_router.shards import Shards, StagedAdapter

MAX_ENTRIES = 65536  # references remembered; clients choose them


class Tier(Enum):
    """The fastest place that holds an adapter."""

    DISK = 1
    HOST = 2
    DEVICE = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """What a reference was resolved to."""

    id: str
    source: str
    revision: str
    digest: str


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One line of a listing. `adapter` is None for what is only on disk."""

    id: str
    source: str
    revision: str
    tier: Tier
    adapter: Adapter | None


class AdapterRegistry:
    """Resolves references, each once, and any number at the same time. A reference includes its token, so that an
    adapter which one caller's token opened is not given to callers without it."""

    def __init__(self, shards: Shards, pool: AdapterPool) -> None:
        self._shards = shards
        self._pool = pool
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # least recently used first
        self._staging: dict[bytes, asyncio.Task[Adapter]] = {}
        self._unstaging: dict[str, asyncio.Task[None]] = {}  # by digest

    async def resolve(self, reference: AdapterReference | MergedReference | None) -> Adapter:
        """The adapter, staged; None is the base model. The caller must use it before it awaits anything else.

        Raises AdapterError with the reason if it cannot be served, InvalidRequestError if adapters cannot be merged.
        """
        if reference is None:
            return self._pool.base
        if isinstance(reference, MergedReference):
            return await self._resolve_merged(reference)
        key = _key(reference)
        while True:
            entry = self._entries.get(key)
            adapter = self._pool.get(entry.digest) if entry else None
            if adapter is not None:
                self._entries.move_to_end(key)
                return adapter
            await self._stage(key, reference)

    async def _resolve_merged(self, reference: MergedReference) -> Adapter:
        """What the merged adapter is follows from its parts' content, so it is looked up by that."""
        merged = replace(reference, weights=reference.weights or (1.0,) * len(reference.adapters))
        keys = [_key(part) for part in merged.adapters]
        while True:
            parts = [entry.digest for key in keys if (entry := self._entries.get(key))]
            adapter = self._pool.get(_merged_digest(parts, merged)) if len(parts) == len(keys) else None
            if adapter is not None:
                return adapter
            key = sha256(repr((keys, *_settings(merged))).encode()).digest()
            await self._once(key, lambda: self._merge(merged))

    async def load(self, reference: AdapterReference) -> AdapterStatus:
        """Reads the source again, whatever was known, and stages what is there now."""
        key = _key(reference)
        adapter = await self._stage(key, reference)
        entry = self._entries[key]
        return AdapterStatus(entry.id, entry.source, entry.revision, _tier(adapter), adapter)

    async def unload(self, reference: AdapterReference) -> None:
        """Frees its slot and its host memory.

        Raises AdapterNotFoundError if it is not loaded, AdapterInUseError while sequences need it.
        """
        entry = self._entries.get(_key(reference))
        adapter = self._pool.get(entry.digest) if entry else None
        if entry is None or adapter is None:
            raise AdapterNotFoundError(f"adapter {reference.id!r} is not loaded")
        if adapter.in_use or adapter.waiting or adapter.merges or (adapter.slot is not None and not adapter.ready):
            raise AdapterInUseError(f"adapter {reference.id!r} is in use")
        self._pool.remove(adapter)
        await self._unstage(adapter)

    async def list(self) -> list[AdapterStatus]:
        """The staged adapters under every name they were asked for, and the names in the adapter directory."""
        local = await self._shards.local_adapters()
        known = {}
        for entry in self._entries.values():
            adapter = self._pool.get(entry.digest)
            if adapter is not None:
                known[entry] = AdapterStatus(entry.id, entry.source, entry.revision, _tier(adapter), adapter)
        staged = {entry.id for entry in known if entry.source == "local"}
        on_disk = [AdapterStatus(id, "local", "", Tier.DISK, None) for id in local if id not in staged]
        return sorted([*known.values(), *on_disk], key=lambda status: (status.id, status.source, status.revision))

    async def _stage(self, key: bytes, reference: AdapterReference) -> Adapter:
        return await self._once(key, lambda: self._stage_alone(key, reference))

    async def _once(self, key: bytes, work: Callable[[], Coroutine[None, None, Adapter]]) -> Adapter:
        """The work for a key is done once at a time; a caller that leaves does not end it for the others."""
        if key not in self._staging:
            self._staging[key] = asyncio.create_task(work())
            self._staging[key].add_done_callback(lambda _: self._staging.pop(key))
        return await asyncio.shield(self._staging[key])

    async def _stage_alone(self, key: bytes, reference: AdapterReference) -> Adapter:
        staged = await self._shards.stage(reference)
        while unstaging := self._unstaging.get(staged.digest):  # dropped while it was staged again
            await asyncio.wait([unstaging])
            staged = await self._shards.stage(reference)
        return self._add(key, Entry(reference.id, staged.source, staged.revision, staged.digest), staged)

    async def _merge(self, merged: MergedReference) -> Adapter:
        parts: list[Adapter] = []
        try:
            for reference in merged.adapters:
                part = await self.resolve(reference)
                part.merges += 1
                parts.append(part)
            digests = [part.digest for part in parts]
            digest = _merged_digest(digests, merged)
            while unstaging := self._unstaging.get(digest):
                await asyncio.wait([unstaging])
            staged = await self._shards.merge(digest, digests, merged)
        finally:
            for part in parts:
                part.merges -= 1
        ids = ",".join(reference.id for reference in merged.adapters)
        return self._add(bytes.fromhex(digest), Entry(ids, "merged", "", digest), staged)

    def _add(self, key: bytes, entry: Entry, staged: StagedAdapter) -> Adapter:
        """Takes a staged adapter into the books; others may have to leave host memory for it."""
        adapter = self._pool.add(staged.digest, staged.lora_rank, staged.size_bytes)
        adapter.name = entry.id
        adapter.chat_template = staged.chat_template
        self._entries[key] = entry
        self._entries.move_to_end(key)
        if len(self._entries) > MAX_ENTRIES:
            self._entries.popitem(last=False)
        for dropped in self._pool.pop_over_budget(keep=adapter):
            self._unstage(dropped)
        return adapter

    def _unstage(self, adapter: Adapter) -> asyncio.Task[None]:
        digest = adapter.digest
        task = self._unstaging[digest] = asyncio.create_task(self._unstage_alone(adapter))
        task.add_done_callback(lambda _: self._unstaging.pop(digest))
        return task

    async def _unstage_alone(self, adapter: Adapter) -> None:
        if adapter.slot is not None:
            await self._shards.unload(adapter.slot)
            self._pool.release_slot(adapter)
        await self._shards.unstage(adapter.digest)


def _key(reference: AdapterReference) -> bytes:
    """Stands for the reference; holds no token in the clear."""
    parts = (reference.source, reference.id, reference.revision, reference.token)
    return sha256(repr(parts).encode()).digest()


def _merged_digest(parts: list[str], merged: MergedReference) -> str:
    return sha256(repr((parts, *_settings(merged))).encode()).hexdigest()


def _settings(merged: MergedReference) -> tuple[object, ...]:
    return merged.weights, merged.strategy, merged.density, merged.majority_sign_method


def _tier(adapter: Adapter) -> Tier:
    return Tier.DEVICE if adapter.ready else Tier.HOST
