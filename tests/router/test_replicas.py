"""Several replicas behind one router: affinity, replicas that stop or are lost, and requests that continue
elsewhere."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from loraplex_protos.errors import (
    AdapterError,
    AdapterNotFoundError,
    AdapterSourceError,
    OverloadedError,
    UnavailableError,
)
from loraplex_router.access.keys import TenantSettings
from loraplex_router.replicas.replica import Replica
from loraplex_router.replicas.replicas import Lease
from loraplex_router.vocabulary.adapter import StagedAdapter
from loraplex_router.vocabulary.references import AdapterReference
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sequence import FinishReason
from tests.router.test_engine import Setup
from tests.router.test_keys import hashed


class Cluster(Setup):
    """A service over replicas whose shards can be lost; each has a running engine."""

    def __init__(self, tenants: Mapping[str, TenantSettings] | None = None, registry_file: Path | None = None) -> None:
        super().__init__(tenants=tenants, registry_file=registry_file)
        self.tasks: dict[Replica, asyncio.Task[None]] = {}
        self.start(self.replica)

    def start(self, replica: Replica) -> None:
        self.tasks[replica] = asyncio.create_task(self.drive(replica))

    def join(self, name: str) -> Replica:
        replica = self.add_replica(name)
        self.start(replica)
        return replica

    async def drive(self, replica: Replica) -> None:
        """Adds a replica, as `Connections` does."""
        with suppress(UnavailableError):
            await replica.engine.run()
        self.replicas.remove(replica)

    def lose(self, replica: Replica) -> None:
        replica.shards.step_error = UnavailableError("rank 1 is gone")

    def holders(self, digest: str) -> list[Replica]:
        return [replica for replica in self.tasks if replica.pool.get(digest)]

    async def close(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    await made.close()


@pytest.fixture
def patient(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait for a replica for long, however slow the machine is."""
    monkeypatch.setattr(cluster.replicas, "_move_seconds", 60)


def request(first: int, tokens: int, adapter: str | None = None, **options: object) -> Request:
    reference = AdapterReference(adapter) if adapter else None
    return Request(prompt=(first,), adapter=reference, max_new_tokens=tokens, **options)


async def test_an_adapter_is_staged_on_one_replica_and_its_requests_go_there(cluster: Cluster):
    cluster.join("second")
    for name in "abcd":
        for _ in range(3):
            assert len(await cluster.answer(1, adapter=name)) == 5
        assert len(cluster.holders(f"digest of {name}")) == 1


async def test_requests_that_come_while_an_adapter_is_staged_go_to_the_same_replica(cluster: Cluster):
    cluster.join("second")
    await asyncio.gather(*(cluster.answer(1, adapter="a") for _ in range(6)))
    assert len(cluster.holders("digest of a")) == 1


async def test_an_adapter_that_overloads_its_replica_is_also_served_by_another(cluster: Cluster):
    cluster.join("second")
    await cluster.answer(1, adapter="a")
    await asyncio.gather(*(cluster.answer(1, tokens=20, adapter="a") for _ in range(30)))
    assert len(cluster.holders("digest of a")) == 2


async def test_the_base_models_requests_go_to_the_less_busy_replica(cluster: Cluster):
    second = cluster.join("second")
    generations = [await cluster.service.generate(request(1, 150)) for _ in range(10)]
    running = [g.scheduler.num_running + g.scheduler.num_waiting for g in (cluster.replica, second)]
    assert running == [5, 5]
    for generation in generations:
        cluster.service.requests.close(generation)


@pytest.mark.usefixtures("patient")
async def test_requests_of_a_lost_replica_continue_in_another_without_losing_tokens(cluster: Cluster):
    generations = [await cluster.service.generate(request(i, 100, "a" if i % 2 else None)) for i in range(6)]
    while not all(generation.outputs[0].generated > 5 for generation in generations):
        await asyncio.sleep(0)
    cluster.join("second")
    cluster.lose(cluster.replica)
    for i, generation in enumerate(generations):
        (delta,) = await generation.collect()
        step = 1 + bool(i % 2)  # both replicas load the adapter into slot 1
        assert [sample.token for sample in delta.samples] == [i + step * k for k in range(1, 101)]
        cluster.service.requests.close(generation)
    assert cluster.service.requests.idle and list(cluster.replicas) != [cluster.replica]


@pytest.mark.usefixtures("patient")
async def test_a_sequence_that_gave_way_with_a_sample_in_flight_stays_where_the_sample_comes(cluster: Cluster):
    second = cluster.join("second")
    cluster.replicas.drain(second)
    cluster.replica.shards.step_seconds = 0.05
    generation = await cluster.service.generate(request(0, 20))
    sequence = generation.outputs[0].sequence
    while not sequence.in_flight:
        await asyncio.sleep(0)
    cluster.replica.scheduler._preempt(sequence)
    second.stopping = False
    cluster.replicas.set_silent("0", True)
    second.stopping = True
    cluster.replicas.set_silent("0", False)
    async with asyncio.timeout(60):
        (delta,) = await generation.collect()
    assert [sample.token for sample in delta.samples] == list(range(1, 21))
    cluster.service.requests.close(generation)


@pytest.mark.usefixtures("patient")
async def test_requests_of_the_only_replica_and_new_ones_wait_for_a_replacement(cluster: Cluster):
    generation = await cluster.service.generate(request(0, 50))
    cluster.lose(cluster.replica)
    await cluster.tasks[cluster.replica]
    assert not cluster.service.healthy
    meanwhile = asyncio.create_task(cluster.answer(1))
    await asyncio.sleep(0.1)
    assert not meanwhile.done()
    cluster.join("second")
    (delta,) = await generation.collect()
    assert [sample.token for sample in delta.samples] == list(range(1, 51))
    assert await meanwhile == [2, 3, 4, 5, 6]
    cluster.service.requests.close(generation)


async def test_new_requests_do_not_wait_longer_than_those_of_the_lost_replica(cluster: Cluster):
    cluster.lose(cluster.replica)
    with pytest.raises(UnavailableError, match="no replacement became ready in time"):
        await cluster.answer(1)
    with pytest.raises(UnavailableError, match="no replica"):
        await cluster.answer(1)


async def test_a_lost_replicas_requests_fail_if_no_replacement_is_ready_in_time(cluster: Cluster):
    generation = await cluster.service.generate(request(0, 100))
    cluster.lose(cluster.replica)
    with pytest.raises(UnavailableError, match="no replacement became ready in time"):
        await generation.collect()
    cluster.service.requests.close(generation)
    assert cluster.service.requests.idle
    labels = {"outcome": "unavailable", "adapter": "[base]"}
    assert cluster.telemetry.registry.get_sample_value("loraplex_requests_total", labels) == 1


@pytest.mark.usefixtures("patient")
async def test_a_request_can_be_cancelled_while_it_has_no_replica(cluster: Cluster):
    generation = await cluster.service.generate(request(0, 100, request_id="mine"))
    cluster.lose(cluster.replica)
    await cluster.tasks[cluster.replica]
    assert not cluster.service.requests.idle
    cluster.service.cancel_request("mine")
    assert cluster.service.requests.idle
    (delta,) = await generation.collect()
    assert delta.finish_reason is FinishReason.CANCELLED
    cluster.service.requests.close(generation)


async def test_a_lost_replicas_requests_wait_for_an_adapter_that_cannot_be_loaded_now(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    generation = await cluster.service.generate(request(0, 100, "a"))
    second = cluster.join("second")
    stage, errors = second.shards.stage, [AdapterSourceError("the hub hangs"), OverloadedError("its reader was killed")]

    async def stage_at_last(reference: AdapterReference) -> StagedAdapter:
        if errors:
            raise errors.pop()
        return await stage(reference)

    monkeypatch.setattr(second.shards, "stage", stage_at_last)
    monkeypatch.setattr(cluster.replicas, "_move_seconds", 60)
    cluster.lose(cluster.replica)
    (delta,) = await generation.collect()
    assert [sample.token for sample in delta.samples] == list(range(2, 202, 2)) and not errors
    cluster.service.requests.close(generation)


@pytest.mark.parametrize(
    ("error", "told", "untold"),
    [
        (
            AdapterNotFoundError("ann/plan is gone"),
            "adapter public@1 of the registry: ann/plan is gone",
            "adapter public@1 of the registry cannot be found in its source: tell the administrator, who sees why",
        ),
        (
            AdapterSourceError("the hub has no connection for ann/plan"),
            "the shards were lost, and adapter public@1 of the registry: the hub has no connection for ann/plan",
            "the shards were lost, and adapter public@1 of the registry cannot be fetched from its source, or is not "
            "what the registry says: tell the administrator, who sees why",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, AdapterError) else "",
)
async def test_why_a_lost_replicas_request_cannot_continue_names_an_origin_only_to_who_may_know_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: AdapterError, told: str, untold: str
) -> None:
    (tmp_path / "registry.yaml").write_text("adapters: {public: {1: {id: ann/plan}}}")
    allowed = {"ann": ["ann/*", "public"], "bob": ["public"]}
    tenants = {name: TenantSettings(keys=[hashed(name)], adapters=names) for name, names in allowed.items()}
    cluster = Cluster(tenants, tmp_path / "registry.yaml")
    asked = {key: await cluster.service.generate(request(0, 100, "public"), key) for key in allowed}
    second = cluster.join("second")

    async def fail(reference: AdapterReference) -> NoReturn:
        raise error

    second.shards.stage = fail
    cluster.lose(cluster.replica)
    for key, wanted in ("ann", told), ("bob", untold):
        with pytest.raises(type(error) if wanted.startswith("adapter") else UnavailableError) as failed:
            await asked[key].collect()
        assert failed.value.message == wanted
        cluster.service.requests.close(asked[key])
    assert caplog.messages.count(f"adapter public@1 of the registry: {error.message}") == 1
    await cluster.close()


async def test_a_request_does_not_continue_with_an_adapter_that_has_changed(cluster: Cluster):
    generation = await cluster.service.generate(request(0, 100, "a"))
    second = cluster.join("second")
    second.shards.digests["a"] = "another digest"
    cluster.lose(cluster.replica)
    with pytest.raises(UnavailableError, match="content"):
        await generation.collect()
    cluster.service.requests.close(generation)


async def test_a_stopping_replica_finishes_running_requests_and_hands_over_waiting_ones(cluster: Cluster):
    started = [await cluster.service.generate(request(i, 100)) for i in range(8)]  # as many as there are rows
    while not all(generation.outputs[0].generated for generation in started):
        await asyncio.sleep(0)
    waiting = await cluster.service.generate(request(50, 5))
    second = cluster.join("second")
    cluster.replicas.drain(cluster.replica)
    assert len(await waiting.collect()) == 1
    assert not any(generation.finished for generation in started)
    assert await cluster.answer(1) == [2, 3, 4, 5, 6]
    assert [entry for entry in second.shards.log if entry.startswith("plan")]
    for generation in started:
        (delta,) = await generation.collect()
        assert len(delta.samples) == 100
    assert cluster.replica.engine.idle
    for generation in (*started, waiting):
        cluster.service.requests.close(generation)


async def test_a_silent_replica_gets_no_requests_hands_over_waiting_ones_and_continues_when_it_answers(
    cluster: Cluster,
):
    started = [await cluster.service.generate(request(i, 100)) for i in range(8)]  # as many as there are rows
    while not all(generation.outputs[0].generated for generation in started):
        await asyncio.sleep(0)
    waiting = await cluster.service.generate(request(50, 5))
    second = cluster.join("second")
    cluster.replicas.set_silent("0", True)
    assert len(await waiting.collect()) == 1
    assert await cluster.answer(1) == [2, 3, 4, 5, 6]
    assert second.engine.idle and not any(generation.finished for generation in started)
    cluster.replicas.set_silent("0", False)
    assert cluster.replica.accepting
    cluster.replicas.drain(cluster.replica)
    cluster.replicas.set_silent("0", False)
    assert not cluster.replica.accepting
    for generation in started:
        await generation.collect()
    for generation in (*started, waiting):
        cluster.service.requests.close(generation)


@pytest.mark.usefixtures("patient")
async def test_the_only_replica_keeps_its_requests_while_it_is_silent(cluster: Cluster):
    generation = await cluster.service.generate(request(0, 30))
    cluster.replicas.set_silent("0", True)
    assert not cluster.service.healthy
    meanwhile = asyncio.create_task(cluster.answer(1))
    assert len((await generation.collect())[0].samples) == 30
    assert not meanwhile.done()
    cluster.replicas.set_silent("0", False)
    assert await meanwhile == [2, 3, 4, 5, 6]
    cluster.service.requests.close(generation)


async def test_the_last_replica_keeps_waiting_requests_when_it_stops(cluster: Cluster):
    generations = [await cluster.service.generate(request(i, 30)) for i in range(12)]
    cluster.replicas.drain(cluster.replica)
    for generation in generations:
        assert len((await generation.collect())[0].samples) == 30
        cluster.service.requests.close(generation)


async def test_a_failure_of_the_routers_own_loop_does_not_spread_to_other_replicas(cluster: Cluster):
    generation = await cluster.service.generate(request(0, 100))
    cluster.join("second")
    cluster.replica.shards.step_error = ZeroDivisionError()
    with pytest.raises(UnavailableError, match="its log has the details"):
        await generation.collect()
    cluster.service.requests.close(generation)


async def test_a_placement_is_counted_and_keeps_its_adapter_until_it_is_closed(cluster: Cluster) -> None:
    cluster.join("1")
    with await cluster.replicas.place(AdapterReference("a")) as lease:
        assert lease.replica.candidate(None).load == 1
        unloading = asyncio.create_task(lease.replica.adapters.unload(lease.adapter))
        await asyncio.sleep(0.01)
        assert lease.replica.pool.get(lease.adapter.digest) is lease.adapter
    await unloading
    assert lease.replica.candidate(None).load == 0
    assert lease.replica.pool.get(lease.adapter.digest) is None


async def test_a_request_whose_replica_is_lost_before_submission_continues_in_another(cluster: Cluster) -> None:
    place, other = cluster.replicas.place, cluster.join("1")

    async def place_on_one_that_is_lost(*options: object) -> Lease:
        lease = await place(*options)
        if lease.replica is not other:
            cluster.lose(lease.replica)
            cluster.tasks[lease.replica].cancel()
            await asyncio.wait([cluster.tasks[lease.replica]])
            cluster.replicas.remove(lease.replica)
        return lease

    cluster.replicas.place = place_on_one_that_is_lost
    assert await cluster.answer(10, adapter="a") == [12, 14, 16, 18, 20]
    assert [replica.name for replica in cluster.replicas] == ["1"]
