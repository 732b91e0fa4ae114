"""The registry's merged adapters: merged once, looked up by content, their parts kept while they are read."""

import asyncio
from hashlib import sha256

import pytest

from loraplex_protos.errors import AdapterInUseError, AdapterNotFoundError
from loraplex_router.adapters.pool import AdapterPool
from loraplex_router.adapters.registry import AdapterRegistry
from loraplex_router.request import AdapterReference, MergedReference
from loraplex_router.shards import StagedAdapter

A, B = AdapterReference("a"), AdapterReference("b")


class Shards:
    """Stages whatever is named, by a digest of its name and version, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.versions: dict[str, int] = {}
        self.staged: set[str] = set()
        self.may_merge = asyncio.Event()
        self.may_merge.set()

    async def stage(self, reference: AdapterReference) -> StagedAdapter:
        if reference.id == "missing":
            raise AdapterNotFoundError("missing")
        self.calls.append(f"stage {reference.id}")
        await asyncio.sleep(0)
        digest = sha256(f"{reference.id}{self.versions.get(reference.id)}".encode()).hexdigest()
        return self._hold(StagedAdapter(digest, "local", "", 8, 10))

    async def merge(self, digest: str, digests: list[str], merged: MergedReference) -> StagedAdapter:
        await self.may_merge.wait()
        assert self.staged.issuperset(digests)
        self.calls.append(f"merge {','.join(reference.id for reference in merged.adapters)} {merged.weights}")
        return self._hold(StagedAdapter(digest, "merged", "", 8, 10))

    async def unstage(self, digest: str) -> None:
        self.staged.remove(digest)

    async def local_adapters(self) -> list[str]:
        return []

    def _hold(self, staged: StagedAdapter) -> StagedAdapter:
        self.staged.add(staged.digest)
        return staged


@pytest.fixture
def shards() -> Shards:
    return Shards()


def registry_of(shards: Shards, host_bytes: int = 1000) -> AdapterRegistry:
    return AdapterRegistry(shards, AdapterPool(4, host_bytes))


async def test_adapters_are_merged_once_however_many_ask(shards: Shards) -> None:
    registry = registry_of(shards)
    found = await asyncio.gather(*(registry.resolve(MergedReference((A, B))) for _ in range(5)))
    found.append(await registry.resolve(MergedReference((A, B), weights=(1.0, 1.0))))
    assert len(set(map(id, found))) == 1
    assert sorted(shards.calls) == ["merge a,b (1.0, 1.0)", "stage a", "stage b"]


async def test_every_setting_makes_another_adapter(shards: Shards) -> None:
    registry = registry_of(shards)
    merges = [
        MergedReference((A, B)),
        MergedReference((B, A)),
        MergedReference((A, B), (1.0, 2.0)),
        MergedReference((A, B), strategy="ties"),
        MergedReference((A, B), strategy="ties", density=0.5),
        MergedReference((A, B), strategy="ties", majority_sign_method="frequency"),
    ]
    digests = {(await registry.resolve(merged)).digest for merged in merges}
    assert len(digests) == len(merges)


async def test_a_part_that_changed_makes_another_adapter(shards: Shards) -> None:
    registry = registry_of(shards)
    before = await registry.resolve(MergedReference((A, B)))
    shards.versions["a"] = 2
    assert await registry.resolve(MergedReference((A, B))) is before
    await registry.load(A)
    assert await registry.resolve(MergedReference((A, B))) is not before


async def test_a_part_that_is_not_found_leaves_the_others_free(shards: Shards) -> None:
    registry = registry_of(shards)
    with pytest.raises(AdapterNotFoundError):
        await registry.resolve(MergedReference((A, AdapterReference("missing"))))
    await registry.unload(A)


async def test_parts_stay_staged_while_they_are_merged(shards: Shards) -> None:
    registry = registry_of(shards, host_bytes=15)  # room for one adapter
    shards.may_merge.clear()
    merging = asyncio.create_task(registry.resolve(MergedReference((A, B))))
    while "stage b" not in shards.calls:
        await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    with pytest.raises(AdapterInUseError):
        await registry.unload(A)
    shards.may_merge.set()
    merged = await merging
    await asyncio.sleep(0.01)
    assert shards.staged == {merged.digest}
    assert [status.source for status in await registry.list()] == ["merged"]
