"""Stages one replica's adapters into host memory and unstages them. The engine loads them onto the device."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from loraplex_protos.errors import (
    AdapterError,
    AdapterSourceError,
    FieldViolation,
    InvalidRequestError,
    LoraplexError,
    OverloadedError,
    UnavailableError,
    quote,
)
from loraplex_router.adapters.resolutions import Entry, Resolutions
from loraplex_router.engine.changes import Changes
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.fair_slots import FairSlots
from loraplex_router.vocabulary.adapter import Adapter, Nearness, StagedAdapter
from loraplex_router.vocabulary.references import (
    AdapterReference,
    MergedReference,
    Reference,
    Upload,
    ids_of,
    key_of,
    merged_digest,
    with_weights,
)
from loraplex_router.wire.shards import AdapterShards, PartlyStagedError

logger = logging.getLogger(__name__)

# Adapters that are staged at a time. Each occupies a thread of every shard, maybe until a source gives up, and a shard
# has 64 threads for all calls.
AT_A_TIME = 48

HUB = "hub"  # the source to which a client's token goes: what it shows for one may be secret, even its name


class Fetching(NamedTuple):
    """A reference being staged."""

    reference: Reference
    tenants: set[str]  # that wait for it
    task: asyncio.Task[Adapter]


class AdapterStaging:
    """Stages requested adapters: each once at a time, many concurrently."""

    def __init__(
        self,
        shards: AdapterShards,
        pool: AdapterPool,
        resolutions: Resolutions,
        changes: Changes,
        wake: Callable[[], None],
    ) -> None:
        """`wake` tells the engine that a slot is free."""
        self._wake = wake
        self._shards = shards
        self._pool = pool
        self._resolutions = resolutions
        self._changes = changes
        self._staging: dict[str, Fetching] = {}  # by the reference's key
        self._unstaging: dict[str, asyncio.Task[None]] = {}  # by digest
        self._noting: dict[object, set[str]] = {}  # see _noting_unstaged
        self._leftover: set[str] = set()  # digests that only some ranks hold
        self._slots = FairSlots(AT_A_TIME)
        self._closed = False

    def held(self, digest: str) -> Adapter | None:
        """Content that is in memory here, even if it will leave once nobody wants it any more."""
        adapter = self._pool.get(digest)
        return None if adapter is None or (adapter.leaving and not adapter.wanted) else adapter

    def fetching(self) -> list[Fetching]:
        return list(self._staging.values())

    def nearness(self, reference: Reference) -> Nearness:
        """How close the adapter is to this replica's device."""
        digest = self._resolutions.digest(reference)
        adapter = self._staged(digest) if digest else None
        if adapter is not None:
            return Nearness.HOST if adapter.slot is None else Nearness.DEVICE
        return Nearness.FETCHING if key_of(reference) in self._staging else Nearness.ABSENT

    async def resolve(self, reference: Reference | None, tenant: str = "") -> Adapter:
        """Stages the adapter for a tenant; None is the base model. The caller must use it before awaiting anything
        else.

        Raises AdapterError with the reason if it cannot be served, InvalidRequestError if adapters cannot be merged,
        OverloadedError if adapters in use leave no room for it in host memory.
        """
        if reference is None:
            return self._pool.base
        while True:
            digest = self._resolutions.digest(reference)
            adapter = self._staged(digest) if digest else None
            if adapter is not None:
                adapter.names.add(",".join(ids_of(reference)))
                self._resolutions.tell(reference, adapter.digest, tenant)
                return adapter
            staged = await self._once(key_of(reference), reference, tenant, lambda: self._bring(reference, tenant))
            if self._staged(staged.digest) is staged:
                self._resolutions.tell(reference, staged.digest, tenant)
                return staged

    async def read_again(self, reference: AdapterReference) -> Adapter:
        """Rereads the source and stages its current content."""
        return await self._once(
            f"{key_of(reference)} again", reference, "", lambda: self._stage(reference, reference.origin, "")
        )

    async def unload(self, adapter: Adapter) -> None:
        """Frees its slot and host memory once nothing needs it. A request for it that arrives meanwhile waits, and
        stages it again. Goes on if the caller is cancelled."""
        if adapter.digest not in self._unstaging:
            adapter.leaving = True
            self._unstage(adapter)
        await asyncio.shield(self._unstaging[adapter.digest])

    def close(self) -> None:
        """Stops waiting: the replica is gone. Calls to its shards fail by themselves."""
        self._closed = True
        self._changes.notify()

    def _staged(self, digest: str) -> Adapter | None:
        """What can be used. So can what is about to leave while requests in preparation hold it: one that asks for it
        may be among them, and would wait for itself."""
        adapter = self._pool.get(digest)
        return None if adapter is None or (adapter.leaving and not adapter.leases) else adapter

    async def _once(
        self, key: str, reference: Reference, tenant: str, work: Callable[[], Coroutine[None, None, Adapter]]
    ) -> Adapter:
        """Runs the work for a key once at a time. Cancelling one caller does not stop it for the others."""
        if key not in self._staging:
            task = asyncio.create_task(work())
            self._staging[key] = Fetching(reference, set(), task)
            task.add_done_callback(lambda _: self._staging.pop(key))
            task.add_done_callback(lambda _: self._changes.notify())
        self._staging[key].tenants.add(tenant)
        return await asyncio.shield(self._staging[key].task)

    async def _bring(self, reference: Reference, tenant: str) -> Adapter:
        if isinstance(reference, MergedReference):
            return await self._merge(with_weights(reference), tenant)
        return await self._stage(reference, self._resolutions.fixed(reference), tenant)

    async def _stage(self, reference: AdapterReference, source: AdapterReference | Upload, tenant: str) -> Adapter:
        staged = await self._on_shards(lambda: self._fetch(source), tenant)
        await self._check_room(staged)
        secret = isinstance(source, AdapterReference) and source.token and staged.source == HUB
        known_to = frozenset[str]() if secret else None  # to those who wait for it, once they get it
        if reference.version is not None and reference.version.digest not in ("", staged.digest):
            known = AdapterReference(source.id, source.source) if isinstance(source, Upload) else source
            self._add(known, Entry(source.id, staged.source, staged.revision, staged.digest, known_to), staged)
            raise AdapterSourceError(
                f"the registry says that {reference.id} has the digest {reference.version.digest}, but the content of "
                f"{'its upload' if isinstance(source, Upload) else quote(source.id)} now has {staged.digest}"
            )
        entry = Entry(reference.id, staged.source, staged.revision, staged.digest, known_to)
        return self._add(reference, entry, staged)

    async def _fetch(self, source: AdapterReference | Upload) -> StagedAdapter:
        if isinstance(source, Upload):
            return await self._shards.upload(source)
        return await self._shards.stage(source)

    async def _merge(self, merged: MergedReference, tenant: str) -> Adapter:
        parts: list[Adapter] = []
        try:
            for place, reference in enumerate(merged.adapters):
                part = await self._resolve_part(reference, place, tenant)
                part.leases += 1
                parts.append(part)
                if part.invocation is not None:
                    why = f"{quote(reference.id)} is an activated adapter (aLoRA), which cannot be merged"
                    raise InvalidRequestError(FieldViolation(f"merged_adapters.adapters[{place}].id", why))
            digests = [part.digest for part in parts]
            digest = merged_digest(digests, merged)
            origins = {part.digest: each.origin for part, each in zip(parts, merged.adapters, strict=True)}
            uploads = {digest: origin for digest, origin in origins.items() if isinstance(origin, Upload)}
            staged = await self._on_shards(lambda: self._shards.merge(digest, digests, merged, uploads), tenant)
        finally:
            for part in parts:
                part.leases -= 1
            self._changes.notify()
        await self._check_room(staged)
        known_to = frozenset[str]() if self._resolutions.is_secret(merged) else None
        return self._add(merged, Entry(",".join(ids_of(merged)), "merged", "", digest, known_to), staged)

    async def _resolve_part(self, reference: AdapterReference, place: int, tenant: str) -> Adapter:
        """Stages one of the adapters to be merged. An error about it says which it is."""
        try:
            return await self.resolve(reference, tenant)
        except AdapterError as error:
            of_part = type(error)(error.message)  # not the same one: others may wait for this adapter alone
            of_part.place = place
            raise of_part from error

    async def _on_shards(self, bring: Callable[[], Coroutine[None, None, StagedAdapter]], tenant: str) -> StagedAdapter:
        """Runs `bring` until all shards have the adapter: again, if it was unstaged meanwhile."""
        while True:
            with self._noting_unstaged() as unstaged:
                staged = await self._with_room(bring, tenant)
            if self._staged(staged.digest) is not None:
                return staged
            if unstaging := self._unstaging.get(staged.digest):
                await asyncio.wait([unstaging])
            elif staged.digest not in unstaged:
                return staged

    @contextmanager
    def _noting_unstaged(self) -> Iterator[set[str]]:
        """The digests that were unstaged since the context began."""
        key = object()
        self._noting[key] = unstaged = set[str]()
        try:
            yield unstaged
        finally:
            del self._noting[key]

    async def _with_room(self, bring: Callable[[], Coroutine[None, None, StagedAdapter]], tenant: str) -> StagedAdapter:
        """Runs `bring`. While the shards have no room for the adapter, unneeded adapters are unstaged, one by one."""
        while True:
            try:
                async with self._slots.taken(tenant):
                    return await self._bring_whole(bring)
            except OverloadedError:
                if await self._drop_leftover():
                    continue
                if adapter := self._pool.least_needed():
                    await self.unload(adapter)
                elif leaving := [task for digest, task in self._unstaging.items() if not self._is_wanted(digest)]:
                    await asyncio.wait(leaving, return_when=asyncio.FIRST_COMPLETED)
                else:  # those who want what is about to leave may wait for this adapter, too
                    raise

    def _is_wanted(self, digest: str) -> bool:
        adapter = self._pool.get(digest)
        return adapter is not None and adapter.wanted

    async def _bring_whole(self, bring: Callable[[], Coroutine[None, None, StagedAdapter]]) -> StagedAdapter:
        """Runs `bring`. If only some ranks stage the adapter, it is unstaged there."""
        try:
            return await bring()
        except PartlyStagedError as partly:
            self._leftover |= partly.digests
            await self._drop_leftover()
            raise partly.error from None

    async def _drop_leftover(self) -> bool:
        """Unstages what only some ranks hold. Returns whether that made room."""
        kept, made_room = set[str](), False
        while self._leftover:
            digest = self._leftover.pop()
            if self._pool.get(digest) is not None or digest in self._unstaging:
                continue  # all ranks hold it, or soon none
            try:
                await self._forget(digest, self._shards.unstage(digest))
                made_room = True
            except UnavailableError:  # the replica is lost, with all that it holds
                raise
            except LoraplexError as error:
                logger.error("adapter %s cannot be unstaged where only some ranks hold it: %s", digest, error)
                kept.add(digest)
        self._leftover |= kept
        return made_room

    async def _check_room(self, staged: StagedAdapter) -> None:
        """See AdapterPool.check_room. An adapter that is refused is unstaged."""
        try:
            self._pool.check_room(staged)
        except OverloadedError:
            await self._forget(staged.digest, self._shards.unstage(staged.digest))
            raise

    def _add(self, reference: Reference, entry: Entry, staged: StagedAdapter) -> Adapter:
        """Registers a staged adapter; others may have to leave host memory for it."""
        adapter = self._pool.add(staged.digest, staged.lora_rank, staged.size_bytes, staged.device_bytes)
        adapter.names.add(entry.id)
        adapter.tokenizer = staged.tokenizer
        adapter.warnings = staged.warnings
        adapter.invocation = staged.invocation
        adapter.classifier = staged.classifier
        self._resolutions.remember(reference, entry)
        for dropped in self._pool.pop_over_budget(keep=adapter):
            self._unstage(dropped)
        return adapter

    def _unstage(self, adapter: Adapter) -> None:
        self._forget(adapter.digest, self._unstage_alone(adapter))

    def _forget(self, digest: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Begins work that unstages the digest."""
        task = self._unstaging[digest] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._unstaged(digest))
        return task

    def _unstaged(self, digest: str) -> None:
        del self._unstaging[digest]
        for noted in self._noting.values():
            noted.add(digest)

    async def _unstage_alone(self, adapter: Adapter) -> None:
        await self._changes.until(lambda: self._closed or not adapter.needed)
        if self._closed:
            return
        if adapter.leaving:
            self._pool.remove(adapter)
        if adapter.slot is not None:
            await self._shards.unload(adapter.slot)
            self._pool.release_slot(adapter)
            self._wake()
        await self._shards.unstage(adapter.digest)
