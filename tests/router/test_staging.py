"""Staging adapters: merged ones once, by content, while their parts are kept; eviction and staging again."""

import asyncio
from collections.abc import Callable
from hashlib import sha256

import pytest

from loraplex_protos.errors import AdapterNotFoundError, AdapterSourceError, LoraplexError, OverloadedError
from loraplex_router.adapters.resolutions import Resolutions
from loraplex_router.adapters.staging import AdapterStaging
from loraplex_router.engine.changes import Changes
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.vocabulary.adapter import StagedAdapter
from loraplex_router.vocabulary.references import AdapterReference, MergedReference, Upload
from loraplex_router.wire.shards import PartlyStagedError

A, B = AdapterReference("a"), AdapterReference("b")


class Shards:
    """Stages any adapter, with a digest of its name and version, and records the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.revisions: list[str] = []
        self.revision = "first"
        self.versions: dict[str, int] = {}
        self.staged: set[str] = set()
        self.unloaded: list[int] = []
        self.room = 1000  # adapters
        self.may_merge = asyncio.Event()
        self.may_merge.set()
        self.links: dict[str, str] = {}  # of ids to those whose content they have
        self.late: dict[str, asyncio.Event] = {}  # ids whose answer comes when it is set, although they are staged
        self.rank_1: LoraplexError | None = None  # why it stages nothing
        self.unstaging: LoraplexError | None = None  # why nothing is unstaged

    async def stage(self, reference: AdapterReference) -> StagedAdapter:
        if reference.id == "missing":
            raise AdapterNotFoundError("missing")
        self.calls.append(f"stage {reference.id}")
        self.revisions.append(reference.revision)
        await asyncio.sleep(0)
        id = self.links.get(reference.id, reference.id)
        digest = sha256(f"{id}{self.versions.get(id)}".encode()).hexdigest()
        staged = self._hold(StagedAdapter(digest, "local", reference.revision or self.revision, 8, 10, 12))
        if reference.id in self.late:
            await self.late[reference.id].wait()
        return staged

    async def upload(self, upload: Upload) -> StagedAdapter:
        raise NotImplementedError

    async def merge(
        self, digest: str, digests: list[str], merged: MergedReference, uploads: dict[str, Upload]
    ) -> StagedAdapter:
        assert not uploads
        await self.may_merge.wait()
        assert self.staged.issuperset(digests)
        self.calls.append(f"merge {','.join(reference.id for reference in merged.adapters)} {merged.weights}")
        return self._hold(StagedAdapter(digest, "merged", "", 8, 10))

    async def unstage(self, digest: str) -> None:
        if self.unstaging is not None:
            raise self.unstaging
        self.staged.remove(digest)

    async def load(self, digest: str, slot: int) -> None:
        raise AssertionError("the engine does that")

    async def unload(self, slot: int) -> None:
        self.unloaded.append(slot)

    def _hold(self, staged: StagedAdapter) -> StagedAdapter:
        if len({*self.staged, staged.digest}) > self.room:
            raise OverloadedError("no room")
        self.staged.add(staged.digest)
        if self.rank_1 is not None:
            raise PartlyStagedError(self.rank_1, {staged.digest})
        return staged


@pytest.fixture
def shards() -> Shards:
    return Shards()


class Staging(AdapterStaging):
    """A staging whose pool tests can see."""

    def __init__(
        self, shards: Shards, host_bytes: int = 1000, resolutions: Resolutions | None = None, device_bytes: int = 0
    ) -> None:
        self.pool = AdapterPool(4, host_bytes, device_bytes)
        self.changes = Changes()
        super().__init__(shards, self.pool, resolutions or Resolutions(), self.changes, wake=lambda: None)


async def test_adapters_are_merged_once_for_all_requests(shards: Shards) -> None:
    staging = Staging(shards)
    found = await asyncio.gather(*(staging.resolve(MergedReference((A, B))) for _ in range(5)))
    found.append(await staging.resolve(MergedReference((A, B), weights=(1.0, 1.0))))
    assert len(set(map(id, found))) == 1
    assert sorted(shards.calls) == ["merge a,b (1.0, 1.0)", "stage a", "stage b"]


async def test_every_setting_makes_a_different_adapter(shards: Shards) -> None:
    staging = Staging(shards)
    merges = [
        MergedReference((A, B)),
        MergedReference((B, A)),
        MergedReference((A, B), (1.0, 2.0)),
        MergedReference((A, B), strategy="ties"),
        MergedReference((A, B), strategy="ties", density=0.5),
        MergedReference((A, B), strategy="ties", majority_sign_method="frequency"),
    ]
    digests = {(await staging.resolve(merged)).digest for merged in merges}
    assert len(digests) == len(merges)


async def test_a_changed_part_makes_a_different_adapter(shards: Shards) -> None:
    staging = Staging(shards)
    before = await staging.resolve(MergedReference((A, B)))
    shards.versions["a"] = 2
    assert await staging.resolve(MergedReference((A, B))) is before
    await staging.read_again(A)
    assert await staging.resolve(MergedReference((A, B))) is not before


async def test_a_missing_part_frees_the_others(shards: Shards) -> None:
    staging = Staging(shards)
    with pytest.raises(AdapterNotFoundError):
        await staging.resolve(MergedReference((A, AdapterReference("missing"))))
    assert not (await staging.resolve(A)).needed


async def test_parts_stay_staged_while_they_are_merged(shards: Shards) -> None:
    staging = Staging(shards, host_bytes=15)  # room for one adapter
    shards.may_merge.clear()
    merging = asyncio.create_task(staging.resolve(MergedReference((A, B))))
    while "stage b" not in shards.calls:
        await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    assert (await staging.resolve(A)).needed
    shards.may_merge.set()
    merged = await merging
    await asyncio.sleep(0.01)
    assert shards.staged == {merged.digest}
    assert [adapter.digest for adapter in staging.pool] == [merged.digest]


async def test_only_unused_adapters_are_evicted_even_from_the_device(shards: Shards) -> None:
    staging = Staging(shards)
    shards.room = 2
    first, second = await staging.resolve(A), await staging.resolve(B)
    for adapter in (first, second):
        assert staging.pool.claim_slot(adapter)
        adapter.ready = True
    second.running = 1
    third = await staging.resolve(AdapterReference("c"))
    assert shards.staged == {second.digest, third.digest} and shards.unloaded == [1]
    third.waiting = 1
    with pytest.raises(OverloadedError, match="no room"):
        await staging.resolve(A)
    third.waiting = 0
    assert (await staging.resolve(A)).digest == first.digest


async def test_idle_adapters_leave_their_slots_when_host_memory_is_full(shards: Shards) -> None:
    staging = Staging(shards, host_bytes=25)  # room for two adapters
    first, second = await staging.resolve(A), await staging.resolve(B)
    for adapter in (first, second):
        assert staging.pool.claim_slot(adapter)
        adapter.ready = True
    third = await staging.resolve(AdapterReference("c"))
    await asyncio.sleep(0.05)
    assert shards.staged == {second.digest, third.digest} and shards.unloaded == [1]
    assert staging.pool.on_device() == [second]


async def test_an_adapter_that_never_fits_beside_the_pinned_ones_is_refused_with_both_numbers(shards: Shards) -> None:
    staging = Staging(shards, device_bytes=30)
    first, second = await staging.resolve(A), await staging.resolve(B)
    staging.pool.pin(first)
    await staging.unload(second)
    staging.pool.device_bytes = 23
    with pytest.raises(OverloadedError, match="needs 12 bytes of each device, but pinned adapters leave only 11 of 23"):
        await staging.resolve(B)
    assert shards.staged == {first.digest}
    staging.pool.unpin(first)
    assert (await staging.resolve(B)).digest == second.digest


async def test_unloading_waits_for_an_adapters_sequences_and_new_requests_wait_for_the_unload(shards: Shards) -> None:
    staging = Staging(shards)
    adapter = await staging.resolve(A)
    adapter.waiting = 1
    unloading = asyncio.create_task(staging.unload(adapter))
    await asyncio.sleep(0)
    asking = asyncio.create_task(staging.resolve(A))
    await asyncio.sleep(0.05)
    assert not unloading.done() and not asking.done()
    adapter.waiting = 0
    staging.changes.notify()
    again = await asking
    await unloading
    assert again is not adapter and again.digest == adapter.digest
    assert shards.staged == {again.digest}


async def test_waiting_ends_for_an_adapter_of_a_lost_replica(shards: Shards) -> None:
    staging = Staging(shards)
    adapter = await staging.resolve(A)
    adapter.running = 1
    unloading = asyncio.create_task(staging.unload(adapter))
    await asyncio.sleep(0)
    staging.close()
    await unloading


async def test_what_only_some_ranks_have_staged_is_unstaged(shards: Shards) -> None:
    staging = Staging(shards)
    first, second = await staging.resolve(A), await staging.resolve(B)
    shards.rank_1 = AdapterSourceError("the source does not answer")
    for reference in AdapterReference("c"), MergedReference((A, B)):
        with pytest.raises(AdapterSourceError, match="does not answer"):
            await staging.resolve(reference)
    with pytest.raises(AdapterSourceError):
        await staging.read_again(A)  # all ranks hold that content already
    assert shards.staged == {first.digest, second.digest}
    shards.rank_1 = None
    third = await staging.resolve(AdapterReference("c"))
    assert shards.staged == {first.digest, second.digest, third.digest}


async def test_what_cannot_be_unstaged_leaves_when_room_is_needed(
    shards: Shards, caplog: pytest.LogCaptureFixture
) -> None:
    staging = Staging(shards)
    shards.room = 2
    first = await staging.resolve(A)
    shards.rank_1, shards.unstaging = AdapterSourceError("the source does not answer"), LoraplexError("rank 0 failed")
    with pytest.raises(AdapterSourceError, match="does not answer"):
        await staging.resolve(B)
    assert "cannot be unstaged where only some ranks hold it: rank 0 failed" in caplog.text
    assert len(shards.staged) == 2
    shards.rank_1 = shards.unstaging = None
    third = await staging.resolve(AdapterReference("c"))
    assert shards.staged == {first.digest, third.digest}


async def test_another_replica_stages_the_revision_that_was_resolved(shards: Shards) -> None:
    resolutions = Resolutions()
    first, second = Staging(shards, resolutions=resolutions), Staging(shards, resolutions=resolutions)
    await first.resolve(A)
    shards.revision = "later"
    await second.resolve(A)
    assert shards.revisions == ["", "first"]
    await second.read_again(A)
    assert shards.revisions[-1] == ""
    await first.resolve(A)


async def test_who_wants_what_is_about_to_leave_does_not_wait_for_it_to_make_room(shards: Shards) -> None:
    staging = Staging(shards)
    shards.room = 2
    shards.may_merge.clear()
    merging = asyncio.create_task(staging.resolve(MergedReference((A, B))))
    await until(lambda: len(staging.pool) == 2 and all(adapter.leases for adapter in staging.pool))
    first = next(iter(staging.pool))
    unloading = asyncio.create_task(staging.unload(first))
    await until(lambda: first.leaving)
    async with asyncio.timeout(60):
        with pytest.raises(OverloadedError, match="no room"):
            await staging.resolve(AdapterReference("c"))
        shards.may_merge.set()
        with pytest.raises(OverloadedError, match="no room"):
            await merging
        await unloading
    assert len(shards.staged) == len(staging.pool) == 1


async def test_who_holds_what_is_about_to_leave_gets_it_again_by_any_name(shards: Shards) -> None:
    staging = Staging(shards)
    shards.links["also a"] = "a"
    held = await staging.resolve(A)
    held.leases += 1
    unloading = asyncio.create_task(staging.unload(held))
    await until(lambda: held.leaving)
    async with asyncio.timeout(60):
        assert await staging.resolve(A) is await staging.resolve(AdapterReference("also a")) is held
        merged = await staging.resolve(MergedReference((A, B)))
        assert not unloading.done()
        held.leases -= 1
        staging.changes.notify()
        await unloading
    assert held.digest not in shards.staged and merged.digest in shards.staged


async def test_what_is_unstaged_before_its_last_rank_has_answered_is_staged_again(shards: Shards) -> None:
    staging = Staging(shards)
    shards.links["also a"] = "a"
    shards.late["also a"] = asyncio.Event()
    adapter = await staging.resolve(A)
    asking = asyncio.create_task(staging.resolve(AdapterReference("also a")))
    await until(lambda: "stage also a" in shards.calls)
    await staging.unload(adapter)
    shards.late["also a"].set()
    again = await asking
    assert again is not adapter and shards.staged == {again.digest} == {adapter.digest}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)
