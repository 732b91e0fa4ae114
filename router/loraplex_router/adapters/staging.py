"""One replica's adapters on their way into host memory and out of it. The engine moves them on, to the device."""

import asyncio
from collections.abc import Callable, Coroutine

from loraplex_protos.errors import OverloadedError
from loraplex_router.adapters.registry import AdapterRegistry, Entry
from loraplex_router.engine.changes import Changes
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.vocabulary.adapter import Adapter, Nearness, StagedAdapter
from loraplex_router.vocabulary.references import (
    AdapterReference,
    MergedReference,
    Reference,
    ids_of,
    key_of,
    merged_digest,
    with_weights,
)
from loraplex_router.wire.shards import AdapterShards


class AdapterStaging:
    """Stages what is asked for, each adapter once, and any number at the same time."""

    def __init__(self, shards: AdapterShards, pool: AdapterPool, registry: AdapterRegistry, changes: Changes) -> None:
        self._shards = shards
        self._pool = pool
        self._registry = registry
        self._changes = changes
        self._staging: dict[str, tuple[Reference, asyncio.Task[Adapter]]] = {}  # by the reference's key
        self._unstaging: dict[str, asyncio.Task[None]] = {}  # by digest
        self._closed = False

    def fetching(self) -> list[Reference]:
        """What is being staged."""
        return [reference for reference, _ in self._staging.values()]

    def nearness(self, reference: Reference) -> Nearness:
        """How near the adapter is to this replica's device."""
        digest = self._registry.digest(reference)
        adapter = self._staged(digest) if digest else None
        if adapter is not None:
            return Nearness.HOST if adapter.slot is None else Nearness.DEVICE
        return Nearness.FETCHING if key_of(reference) in self._staging else Nearness.ABSENT

    async def resolve(self, reference: Reference | None) -> Adapter:
        """The adapter, staged; None is the base model. The caller must use it before it awaits anything else.

        Raises AdapterError with the reason if it cannot be served, InvalidRequestError if adapters cannot be merged,
        OverloadedError if those in use leave no room for it in host memory.
        """
        if reference is None:
            return self._pool.base
        while True:
            digest = self._registry.digest(reference)
            adapter = self._staged(digest) if digest else None
            if adapter is not None:
                adapter.names.add(",".join(ids_of(reference)))
                return adapter
            staged = await self._once(key_of(reference), reference, lambda: self._bring(reference))
            if self._staged(staged.digest) is staged:
                return staged

    async def read_again(self, reference: AdapterReference) -> Adapter:
        """Reads the source, whatever was known, and stages what is there now."""
        return await self._once(f"{key_of(reference)} again", reference, lambda: self._stage(reference, reference))

    async def unload(self, adapter: Adapter) -> None:
        """Frees its slot and its host memory once nothing needs it; a request that comes for it meanwhile waits, and
        has it staged again. A caller that leaves does not change this."""
        if adapter.digest not in self._unstaging:
            adapter.leaving = True
            self._unstage(adapter)
        await asyncio.shield(self._unstaging[adapter.digest])

    def close(self) -> None:
        """The replica is gone: nothing is waited for any longer. What its shards were asked fails by itself."""
        self._closed = True
        self._changes.notify()

    def _staged(self, digest: str) -> Adapter | None:
        adapter = self._pool.get(digest)
        return None if adapter is None or adapter.leaving else adapter

    async def _once(
        self, key: str, reference: Reference, work: Callable[[], Coroutine[None, None, Adapter]]
    ) -> Adapter:
        """The work for a key is done once at a time; a caller that leaves does not end it for the others."""
        if key not in self._staging:
            task = asyncio.create_task(work())
            self._staging[key] = reference, task
            task.add_done_callback(lambda _: self._staging.pop(key))
        return await asyncio.shield(self._staging[key][1])

    async def _bring(self, reference: Reference) -> Adapter:
        if isinstance(reference, MergedReference):
            return await self._merge(with_weights(reference))
        return await self._stage(reference, self._registry.fixed(reference))

    async def _stage(self, reference: AdapterReference, source: AdapterReference) -> Adapter:
        staged = await self._with_room(lambda: self._shards.stage(source))
        while unstaging := self._unstaging.get(staged.digest):  # it leaves, or was dropped while it was staged again
            await asyncio.wait([unstaging])
            staged = await self._with_room(lambda: self._shards.stage(source))
        return self._add(reference, Entry(reference.id, staged.source, staged.revision, staged.digest), staged)

    async def _merge(self, merged: MergedReference) -> Adapter:
        parts: list[Adapter] = []
        try:
            for reference in merged.adapters:
                part = await self.resolve(reference)
                part.leases += 1
                parts.append(part)
            digests = [part.digest for part in parts]
            digest = merged_digest(digests, merged)
            while unstaging := self._unstaging.get(digest):
                await asyncio.wait([unstaging])
            staged = await self._with_room(lambda: self._shards.merge(digest, digests, merged))
        finally:
            for part in parts:
                part.leases -= 1
            self._changes.notify()
        return self._add(merged, Entry(",".join(ids_of(merged)), "merged", "", digest), staged)

    async def _with_room(self, bring: Callable[[], Coroutine[None, None, StagedAdapter]]) -> StagedAdapter:
        """What `bring` stages; while the shards have no room for it, adapters that nobody needs leave, one by one."""
        while True:
            try:
                return await bring()
            except OverloadedError:
                if adapter := self._pool.least_needed():
                    await self.unload(adapter)
                elif self._unstaging:  # others make room
                    await asyncio.wait(self._unstaging.values(), return_when=asyncio.FIRST_COMPLETED)
                else:
                    raise

    def _add(self, reference: Reference, entry: Entry, staged: StagedAdapter) -> Adapter:
        """Takes a staged adapter into the books; others may have to leave host memory for it."""
        adapter = self._pool.add(staged.digest, staged.lora_rank, staged.size_bytes)
        adapter.names.add(entry.id)
        adapter.tokenizer = staged.tokenizer
        adapter.warnings = staged.warnings
        self._registry.remember(reference, entry)
        for dropped in self._pool.pop_over_budget(keep=adapter):
            self._unstage(dropped)
        return adapter

    def _unstage(self, adapter: Adapter) -> None:
        digest = adapter.digest
        task = self._unstaging[digest] = asyncio.create_task(self._unstage_alone(adapter))
        task.add_done_callback(lambda _: self._unstaging.pop(digest))

    async def _unstage_alone(self, adapter: Adapter) -> None:
        await self._changes.until(lambda: self._closed or not adapter.needed)
        if self._closed:
            return
        if adapter.leaving:
            self._pool.remove(adapter)
        if adapter.slot is not None:
            await self._shards.unload(adapter.slot)
            self._pool.release_slot(adapter)
        await self._shards.unstage(adapter.digest)
