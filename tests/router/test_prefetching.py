"""Registered versions are fetched to the replicas' disks before the first request, and the listing says how far."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from loraplex_protos.errors import AdapterNotFoundError, AdapterSourceError
from loraplex_protos.generation_pb2 import (
    ADAPTER_STATE_AVAILABLE,
    ADAPTER_STATE_FAILED,
    ADAPTER_STATE_FETCHING,
    ADAPTER_STATE_REGISTERED,
    ADAPTER_TIER_DISK,
    AdapterStatus,
)
from loraplex_router.adapters.registry import reference_to
from loraplex_router.replicas import prefetching
from loraplex_router.replicas.prefetching import Prefetched, Prefetching
from loraplex_router.vocabulary.adapter import Fetch
from tests.router.test_registry import read_content
from tests.router.test_replicas import Cluster

HUB = {"source": "hub"}


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    running = asyncio.create_task(made.prefetching.run())
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await made.close()


def register(cluster: Cluster, *ids: str) -> None:
    adapters = {f"name-{number}": {1: {"id": id, **HUB}} for number, id in enumerate(ids)}
    cluster.registry.update(read_content({"adapters": adapters}))


async def status(cluster: Cluster, id: str) -> AdapterStatus:
    return next(each for each in (await cluster.administration.listing.page()).adapters if each.id == id)


def results(cluster: Cluster, id: str) -> list[Prefetched]:
    return cluster.prefetching.results(reference_to(cluster.registry.find(id)))


def fetched(cluster: Cluster) -> list[str]:
    return [line.removeprefix("fetch ") for line in cluster.shards.log if line.startswith("fetch ")]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_what_is_registered_is_fetched_by_every_replica_and_not_loaded(cluster: Cluster) -> None:
    register(cluster, "org/a", "org/b", "org/c")
    await until(lambda: sorted(fetched(cluster)) == ["org/a", "org/b", "org/c"])
    second = cluster.join("second")
    await until(lambda: sum(line.startswith("fetch ") for line in second.shards.log) == 3)
    found = await status(cluster, "name-0@1")
    assert (found.state, found.tier, found.HasField("size_bytes")) == (
        ADAPTER_STATE_AVAILABLE,
        ADAPTER_TIER_DISK,
        False,
    )
    register(cluster, "org/a", "org/b", "org/c", "org/d")
    await until(lambda: "org/d" in fetched(cluster))
    assert len(fetched(cluster)) == 4


async def test_a_few_are_fetched_at_a_time_and_the_listing_says_how_far(cluster: Cluster) -> None:
    cluster.shards.fetches_held.clear()
    register(cluster, "org/a", "org/b", "org/c")
    await until(lambda: len(fetched(cluster)) == prefetching.AT_A_TIME)
    first, last = await status(cluster, "name-0@1"), await status(cluster, "name-2@1")
    assert (first.state, first.fetched_bytes, first.total_bytes) == (ADAPTER_STATE_FETCHING, 30, 120)
    assert (last.state, last.HasField("fetched_bytes")) == (ADAPTER_STATE_REGISTERED, False)
    cluster.shards.fetching[0] = Fetch("org/a", "hub", "", 30, 120, "the hub answered 503")
    assert (await status(cluster, "name-0@1")).reason == "the hub answered 503"
    cluster.shards.fetches_held.set()
    await until(lambda: len(fetched(cluster)) == 3)


async def test_replicas_may_leave_while_what_is_fetched_is_looked_through(cluster: Cluster) -> None:
    second = cluster.join("second")
    register(cluster, "org/a", "org/b")
    await until(lambda: all(len(results(cluster, f"name-{number}@1")) == 2 for number in range(2)))
    for replica in (cluster.replica, second):
        updating = asyncio.create_task(cluster.prefetching._update())
        await asyncio.sleep(0)  # it has begun with a replica
        cluster.replicas.remove(replica)
        await updating
    await until(lambda: not cluster.prefetching._work)


async def test_requests_go_first(cluster: Cluster) -> None:
    cluster.shards.stages_held.clear()
    asking = asyncio.create_task(cluster.answer(1, adapter="b"))
    await until(lambda: bool(cluster.replica.adapters.fetching()))
    register(cluster, "org/a")
    await asyncio.sleep(0.02)
    assert fetched(cluster) == []
    cluster.shards.stages_held.set()
    await asking
    await until(lambda: fetched(cluster) == ["org/a"])


async def test_a_failure_is_listed_with_its_reason_and_a_passing_one_is_tried_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register(cluster, "absent")
    await until(lambda: "cannot fetch the registered adapter 'name-0@1': no absent" in caplog.text)
    found = await status(cluster, "name-0@1")
    assert (found.state, found.reason) == (ADAPTER_STATE_FAILED, "no absent")
    monkeypatch.setattr(prefetching, "FIRST_WAIT", 0.001)
    cluster.shards.fetch_error = AdapterSourceError("the hub is down")
    register(cluster, "absent", "org/a")
    await until(lambda: fetched(cluster).count("org/a") > 1)
    assert (await status(cluster, "name-1@1")).reason == "the hub is down"
    cluster.shards.fetch_error = None
    await until(lambda: all(each.fetched_bytes == 10 for each in results(cluster, "name-1@1")))
    assert (await status(cluster, "name-1@1")).state == ADAPTER_STATE_AVAILABLE
    assert fetched(cluster).count("absent") == 1


async def test_what_lies_in_the_adapter_directory_has_the_state_that_it_has_there(cluster: Cluster) -> None:
    origins = {"whole": {"id": "a"}, "cut": {"id": "broken", "source": "local"}, "x": {"id": "absent", **HUB}}
    cluster.registry.update(read_content({"adapters": {name: {1: origin} for name, origin in origins.items()}}))
    await until(lambda: len(fetched(cluster)) == 3)
    assert (await status(cluster, "whole@1")).state == ADAPTER_STATE_AVAILABLE
    broken = await status(cluster, "cut@1")
    assert (broken.state, broken.reason) == (ADAPTER_STATE_FAILED, "cut short")
    assert (await status(cluster, "x@1")).reason == "no absent"


@pytest.mark.parametrize("most", [1000, 0])
async def test_what_no_source_can_have_is_said_when_the_registry_is_read_and_the_rest_is_served(
    caplog: pytest.LogCaptureFixture, most: int
) -> None:
    cluster = Cluster()
    cluster.prefetching._most = most
    cluster.shards.refused = {"ftp://host/a": "this server has no adapter source 'ftp'"}
    running = asyncio.create_task(cluster.prefetching.run())
    register(cluster, "org/a", "ftp://host/a", "org/b")
    await until(lambda: "the registered adapter 'name-1@1' cannot be served: this server has no" in caplog.text)
    found = await status(cluster, "name-1@1")
    assert (found.state, found.reason) == (ADAPTER_STATE_FAILED, "this server has no adapter source 'ftp'")
    await until(lambda: len(fetched(cluster)) == (2 if most else 0))
    assert "ftp://host/a" not in fetched(cluster)
    assert len(await cluster.answer(1, adapter="name-0")) == 5
    register(cluster, "org/a", "s3://bucket/a", "org/b")
    await until(lambda: cluster.shards.log.count("refusals 1") == 1)  # only what is new is looked at again
    assert (await status(cluster, "name-1@1")).state != ADAPTER_STATE_FAILED
    running.cancel()
    await cluster.close()


async def test_no_more_is_fetched_than_the_setting_allows(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster()
    for most, count in ((15, 2), (0, 0)):  # two at a time, of ten bytes each
        cluster.shards.log.clear()
        cluster.prefetching = Prefetching(cluster.registry, cluster.replicas, most)
        running = asyncio.create_task(cluster.prefetching.run())
        register(cluster, *(f"org/{number}" for number in range(6)))
        await asyncio.sleep(0.05)
        assert len(fetched(cluster)) == count
        running.cancel()
    assert "4 registered adapters are not fetched before their first request: --adapter-prefetch-gib" in caplog.text
    await cluster.close()


async def test_a_failed_version_is_still_looked_up_by_a_request(cluster: Cluster) -> None:
    register(cluster, "absent")
    await until(lambda: bool(results(cluster, "name-0@1")))
    with pytest.raises(AdapterNotFoundError):
        await cluster.answer(1, adapter="name-0")
    cluster.shards.absent = set()
    assert len(await cluster.answer(1, adapter="name-0")) == 5
