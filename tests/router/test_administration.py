"""Operators' calls over several groups: one line per adapter, unloading everywhere, pins that outlive a group."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from loraplex_protos.errors import AdapterInUseError, AdapterNotFoundError, AdapterPinsError
from loraplex_router.adapters.administration import AdapterStatus, State, Tier
from loraplex_router.request import AdapterReference
from tests.router.test_groups import Cluster, request

A, B, C = (AdapterReference(name) for name in "abc")


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    await made.close()


async def listed(cluster: Cluster) -> dict[str, AdapterStatus]:
    return {status.id: status for status in await cluster.administration.list()}


async def on_both(cluster: Cluster) -> None:
    """Makes `a` so busy that two groups have it."""
    await cluster.answer(1, adapter="a")
    await asyncio.gather(*(cluster.answer(1, tokens=20, adapter="a") for _ in range(30)))


async def test_an_adapter_is_listed_once_with_all_the_groups_that_have_it(cluster: Cluster):
    cluster.join("second")
    await on_both(cluster)
    generation = await cluster.service.generate(request(1, 100, "a"))
    status = (await listed(cluster))["a"]
    assert {residence.group for residence in status.residences} == {"0", "second"}
    assert (status.state, status.tier, status.lora_rank, status.size_bytes) == (State.LOADED, Tier.DEVICE, 8, 10)
    assert (status.requests, status.running + status.waiting, status.pinned) == (1, 1, False)
    cluster.service.leave(generation)
    assert (await listed(cluster))["a"].requests == 0
    assert status.last_used > 0
    assert (await listed(cluster))["b"].state is State.AVAILABLE


async def test_what_is_broken_is_listed_with_the_reason_and_what_is_doubtful_with_warnings(cluster: Cluster):
    cluster.group.shards.warnings = ("made for another model",)
    await cluster.answer(1, adapter="a")
    statuses = await listed(cluster)
    assert (statuses["broken"].state, statuses["broken"].reason) == (State.BROKEN, "cut short")
    assert (statuses["a"].state, statuses["a"].warnings) == (State.LOADED, ("made for another model",))


async def test_what_is_on_its_way_is_listed_as_such(cluster: Cluster):
    cluster.group.shards.stages_held.clear()
    asking = asyncio.create_task(cluster.answer(1, adapter="c"))
    await asyncio.sleep(0.01)
    status = (await listed(cluster))["c"]
    assert (status.state, status.tier, status.digest) == (State.FETCHING, None, "")
    cluster.group.shards.stages_held.set()
    await asking


async def test_an_adapter_is_unloaded_from_every_group_or_from_none(cluster: Cluster):
    cluster.join("second")
    await on_both(cluster)
    generation = await cluster.service.generate(request(1, 100, "a"))
    with pytest.raises(AdapterInUseError):
        await cluster.administration.unload(A, wait=False)
    assert len(cluster.holders("digest of a")) == 2
    unloading = asyncio.create_task(cluster.administration.unload(A, wait=True))
    await asyncio.sleep(0)
    cluster.service.leave(generation)
    await unloading
    assert not cluster.holders("digest of a")
    assert (await listed(cluster))["a"].state is State.AVAILABLE
    with pytest.raises(AdapterNotFoundError):
        await cluster.administration.unload(A, wait=False)


async def test_what_was_unloaded_is_resolved_anew(cluster: Cluster):
    await cluster.answer(1, adapter="a")
    await cluster.administration.unload("digest of a", wait=False)
    cluster.group.shards.digests["a"] = "new digest"
    await cluster.answer(1, adapter="a")
    assert cluster.holders("new digest")


async def test_pins_leave_one_slot_to_the_others_on_each_group(cluster: Cluster):
    assert (await cluster.administration.pin(A)).pinned
    assert (await cluster.administration.pin(A)).pinned  # again
    with pytest.raises(AdapterPinsError):
        await cluster.administration.pin(B)
    for name in "bcb":
        await cluster.answer(1, adapter=name)
    assert (await listed(cluster))["a"].tier is Tier.DEVICE
    cluster.administration.unpin(A)
    assert (await cluster.administration.pin(B)).tier is Tier.DEVICE


async def test_a_pin_that_is_unloaded_is_gone(cluster: Cluster):
    await cluster.administration.pin(A)
    await cluster.administration.unload(A, wait=False)
    assert (await cluster.administration.pin(B)).pinned
    await cluster.administration.restore_pins()
    assert not cluster.holders("digest of a")


async def test_what_was_pinned_on_a_lost_group_is_pinned_on_another(cluster: Cluster):
    await cluster.administration.pin(A)
    second = cluster.join("second")
    cluster.lose(cluster.group)
    generation = await cluster.service.generate(request(1, 5))  # its step finds the group lost
    await generation.collect()
    cluster.service.leave(generation)
    if cluster.group in list(cluster.groups):
        cluster.groups.remove(cluster.group)
    await cluster.administration.restore_pins()
    adapter = second.pool.get("digest of a")
    assert adapter is not None and adapter.pinned and adapter.ready


async def test_what_is_not_loaded_cannot_be_pinned_by_digest_or_unpinned(cluster: Cluster):
    with pytest.raises(AdapterNotFoundError):
        await cluster.administration.pin("digest of a")
    with pytest.raises(AdapterNotFoundError):
        cluster.administration.unpin(A)
