"""Operators' calls over several replicas: one line per adapter, unloading everywhere, pins that outlive a replica."""

import asyncio
import threading
import unicodedata
from collections.abc import AsyncIterator, Iterable
from hashlib import sha256

import pytest

from loraplex_protos.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterPinsError,
    InvalidRequestError,
    LoraplexError,
    UnavailableError,
)
from loraplex_protos.generation_pb2 import ADAPTER_STATE_AVAILABLE as AVAILABLE
from loraplex_protos.generation_pb2 import ADAPTER_STATE_BROKEN as BROKEN
from loraplex_protos.generation_pb2 import ADAPTER_STATE_FETCHING as FETCHING
from loraplex_protos.generation_pb2 import ADAPTER_STATE_LOADED as LOADED
from loraplex_protos.generation_pb2 import ADAPTER_TIER_DEVICE as DEVICE
from loraplex_protos.generation_pb2 import AdapterResidence, AdapterStatus
from loraplex_router.access.keys import Keys, TenantSettings
from loraplex_router.access.tenant import Allowance, Tenant
from loraplex_router.adapters import suggestions
from loraplex_router.adapters.suggestions import similar
from loraplex_router.api.http.admin import schema
from loraplex_router.api.http.json_message import write_message
from loraplex_router.vocabulary.adapter import LocalAdapter
from loraplex_router.vocabulary.references import AdapterReference
from tests.router.test_replicas import Cluster, request

A, B, C = (AdapterReference(name) for name in "abc")


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    await made.close()


async def listed(cluster: Cluster) -> dict[str, AdapterStatus]:
    return {status.id: status for status in (await cluster.administration.listing.page()).adapters}


async def on_both(cluster: Cluster) -> None:
    """Sends so many requests for `a` that two replicas have it."""
    await cluster.answer(1, adapter="a")
    await asyncio.gather(*(cluster.answer(1, tokens=20, adapter="a") for _ in range(30)))


async def test_an_adapter_is_listed_once_with_all_the_replicas_that_have_it(cluster: Cluster):
    cluster.join("second")
    await on_both(cluster)
    generation = await cluster.service.generate(request(1, 100, "a"))
    status = (await listed(cluster))["a"]
    assert {residence.replica for residence in status.residences} == {"0", "second"}
    assert (status.state, status.tier, status.lora_rank, status.size_bytes) == (LOADED, DEVICE, 8, 10)
    assert (status.requests, status.running_sequences + status.waiting_sequences, status.pinned) == (1, 1, False)
    cluster.service.requests.close(generation)
    assert (await listed(cluster))["a"].requests == 0
    assert status.last_used > 0
    assert (await listed(cluster))["b"].state == AVAILABLE


async def test_the_json_of_a_status_has_the_messages_fields_and_null_for_absent_ones(cluster: Cluster):
    fields = [field.name for field in AdapterStatus.DESCRIPTOR.fields]
    assert set(fields) == set(schema.AdapterStatus.model_fields)
    assert {field.name for field in AdapterResidence.DESCRIPTOR.fields} == set(schema.AdapterResidence.model_fields)
    cluster.replica.shards.stages_held.clear()
    asking = asyncio.create_task(cluster.answer(1, adapter="c"))
    await asyncio.sleep(0.01)
    statuses = await listed(cluster)
    cluster.replica.shards.stages_held.set()
    await asking
    counts = {"requests": 0, "running_sequences": 0, "waiting_sequences": 0}
    absent = "tier", "digest", "lora_rank", "size_bytes", "last_used", "reason", "classifier"
    nothing = dict.fromkeys((*absent, "fetched_bytes", "total_bytes"))
    rest = {
        "revision": "",
        "pinned": False,
        "residences": [],
        "warnings": [],
        "invocation": "",
        "invocation_token_ids": [],
        "targets": [],
        **nothing,
        **counts,
    }
    assert write_message(statuses["c"]) == {"id": "c", "source": "", "state": "fetching", **rest}
    local = {"source": "local", **rest, "tier": "disk"}
    assert write_message(statuses["b"]) == {"id": "b", "state": "available", **local}
    assert write_message(statuses["broken"]) == {"id": "broken", "state": "broken", **local, "reason": "cut short"}
    found = write_message((await listed(cluster))["c"])
    residence = {"replica": "0", "tier": "device", "running_sequences": 0, "waiting_sequences": 0, "pinned": False}
    assert (found["state"], found["lora_rank"], found["residences"]) == ("loaded", 8, [residence])
    schema.AdapterStatus.model_validate(found)


async def test_broken_adapters_are_listed_with_the_reason_and_doubtful_ones_with_warnings(cluster: Cluster):
    cluster.replica.shards.warnings = ("made for another model",)
    await cluster.answer(1, adapter="a")
    statuses = await listed(cluster)
    assert (statuses["broken"].state, statuses["broken"].reason) == (BROKEN, "cut short")
    assert (statuses["a"].state, [*statuses["a"].warnings]) == (LOADED, ["made for another model"])


async def test_adapters_that_are_being_fetched_are_listed(cluster: Cluster):
    cluster.replica.shards.stages_held.clear()
    asking = asyncio.create_task(cluster.answer(1, adapter="c"))
    await asyncio.sleep(0.01)
    status = (await listed(cluster))["c"]
    assert (status.state, status.HasField("tier"), status.HasField("digest")) == (FETCHING, False, False)
    cluster.replica.shards.stages_held.set()
    await asking


async def test_an_adapter_is_unloaded_from_every_replica_or_from_none(cluster: Cluster):
    cluster.join("second")
    await on_both(cluster)
    generation = await cluster.service.generate(request(1, 100, "a"))
    with pytest.raises(AdapterInUseError):
        await cluster.administration.unload(A, wait=False)
    assert len(cluster.holders("digest of a")) == 2
    unloading = asyncio.create_task(cluster.administration.unload(A, wait=True))
    await asyncio.sleep(0)
    cluster.service.requests.close(generation)
    await unloading
    assert not cluster.holders("digest of a")
    assert (await listed(cluster))["a"].state == AVAILABLE
    with pytest.raises(AdapterNotFoundError):
        await cluster.administration.unload(A, wait=False)


async def test_a_plan_still_in_flight_delays_an_unload_but_does_not_refuse_it(cluster: Cluster):
    await cluster.answer(1, adapter="a")
    adapter = cluster.replica.pool.get("digest of a")
    assert adapter is not None
    adapter.plans += 1
    unloading = asyncio.create_task(cluster.administration.unload(A, wait=False))
    await asyncio.sleep(0.01)
    assert cluster.holders("digest of a") and not unloading.done()
    adapter.plans -= 1
    await cluster.answer(1, adapter="b")  # the plan's result notifies the waiting call
    await unloading
    assert not cluster.holders("digest of a")


async def test_an_unloaded_adapter_is_resolved_again(cluster: Cluster):
    await cluster.answer(1, adapter="a")
    await cluster.administration.unload("digest of a", wait=False)
    cluster.replica.shards.digests["a"] = "new digest"
    await cluster.answer(1, adapter="a")
    assert cluster.holders("new digest")


async def test_pins_leave_one_slot_to_the_others_on_each_replica(cluster: Cluster):
    assert (await cluster.administration.pin(A)).pinned
    assert (await cluster.administration.pin(A)).pinned  # again
    with pytest.raises(AdapterPinsError):
        await cluster.administration.pin(B)
    for name in "bcb":
        await cluster.answer(1, adapter=name)
    assert (await listed(cluster))["a"].tier == DEVICE
    cluster.administration.unpin(A)
    assert (await cluster.administration.pin(B)).tier == DEVICE


async def test_an_adapter_that_cannot_be_loaded_is_not_pinned(cluster: Cluster):
    cluster.replica.shards.load_error = LoraplexError("rank 0 failed")
    with pytest.raises(UnavailableError, match="cannot be loaded onto the device, so it is not pinned"):
        await cluster.administration.pin(A)
    cluster.replica.shards.load_error = None
    assert not (await listed(cluster))["a"].pinned
    assert (await cluster.administration.pin(A)).tier == DEVICE


async def test_a_pin_that_is_unloaded_is_gone(cluster: Cluster):
    await cluster.administration.pin(A)
    await cluster.administration.unload(A, wait=False)
    assert (await cluster.administration.pin(B)).pinned
    await cluster.administration.restore_pins()
    assert not cluster.holders("digest of a")


async def test_an_adapter_that_is_about_to_leave_is_pinned_once_it_is_staged_again(cluster: Cluster):
    with await cluster.replicas.place(A) as lease:
        unloading = asyncio.create_task(cluster.administration.unload(A, wait=True))
        while not lease.adapter.leaving:
            await asyncio.sleep(0)
        pinning = asyncio.create_task(cluster.administration.pin(A))
        for _ in range(5):
            await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await unloading
        await pinning
    assert (await listed(cluster))["a"].pinned


async def test_pins_of_a_lost_replica_move_to_another(cluster: Cluster):
    await cluster.administration.pin(A)
    second = cluster.join("second")
    cluster.lose(cluster.replica)
    generation = await cluster.service.generate(request(1, 5))  # its step finds the replica lost
    await generation.collect()
    cluster.service.requests.close(generation)
    if cluster.replica in list(cluster.replicas):
        cluster.replicas.remove(cluster.replica)
    await cluster.administration.restore_pins()
    adapter = second.pool.get("digest of a")
    assert adapter is not None and adapter.pinned and adapter.ready


async def test_an_adapter_that_is_not_loaded_cannot_be_pinned_by_digest_or_unpinned(cluster: Cluster):
    with pytest.raises(AdapterNotFoundError):
        await cluster.administration.pin("digest of a")
    with pytest.raises(AdapterNotFoundError):
        cluster.administration.unpin(A)


async def same_content(cluster: Cluster) -> None:
    """`a` and `c` hold the same files."""
    cluster.replica.shards.digests = {"a": "same", "c": "same"}
    await cluster.answer(1, adapter="a")
    await cluster.answer(1, adapter="c")


async def test_content_with_two_names_answers_under_the_requested_name(cluster: Cluster):
    await same_content(cluster)
    statuses = await listed(cluster)
    assert statuses["a"].digest == statuses["c"].digest == "same"
    for reference in (A, C):
        assert (await cluster.administration.load(reference)).id == reference.id
        assert (await cluster.administration.pin(reference)).id == reference.id
        assert cluster.administration.unpin(reference).id == reference.id
    generation = await cluster.service.generate(request(1, 1, "a"))
    assert generation.adapter_name == "a"
    cluster.service.requests.close(generation)


async def test_unloading_a_name_frees_that_name_and_the_last_name_frees_the_content(cluster: Cluster):
    await same_content(cluster)
    await cluster.administration.pin(C)
    running = await cluster.service.generate(request(1, 100, "c"))
    await cluster.administration.unload(A, wait=False)
    statuses = await listed(cluster)
    assert (statuses["a"].state, statuses["c"].state, statuses["c"].pinned) == (AVAILABLE, LOADED, True)
    assert cluster.replica.pool.get("same").names == {"c"}
    with pytest.raises(AdapterNotFoundError):
        await cluster.administration.unload(A, wait=False)
    with pytest.raises(AdapterInUseError):
        await cluster.administration.unload(C, wait=False)
    cluster.service.requests.close(running)
    await cluster.administration.unload(C, wait=True)
    assert not cluster.holders("same")


async def test_a_name_that_sequences_requested_is_in_use_even_if_the_content_has_another(cluster: Cluster):
    await same_content(cluster)
    running = await cluster.service.generate(request(1, 100, "a"))
    with pytest.raises(AdapterInUseError):
        await cluster.administration.unload(A, wait=False)
    unloading = asyncio.create_task(cluster.administration.unload(A, wait=True))
    await asyncio.sleep(0)
    cluster.service.requests.close(running)
    await unloading
    statuses = await listed(cluster)
    assert (statuses["a"].state, statuses["c"].state) == (AVAILABLE, LOADED)


async def test_content_that_is_loaded_again_has_the_names_that_are_requested(cluster: Cluster):
    await same_content(cluster)
    adapter = cluster.replica.pool.get("same")
    await cluster.replica.adapters.unload(adapter)  # like an eviction: its names stay known
    for name in "ac":
        await cluster.answer(1, adapter=name)
    assert cluster.replica.pool.get("same").names == {"a", "c"}


async def test_a_pin_belongs_to_the_name_that_was_pinned(cluster: Cluster):
    await same_content(cluster)
    await cluster.administration.pin(A)
    await cluster.administration.unload(A, wait=False)
    assert not (await listed(cluster))["c"].pinned


async def test_two_names_of_one_content_are_pinned_each_by_itself(cluster: Cluster):
    async def pinned() -> tuple[bool, bool, bool]:
        statuses = await listed(cluster)
        return statuses["a"].pinned, statuses["c"].pinned, cluster.replica.pool.get("same").pinned

    await same_content(cluster)
    await cluster.administration.pin(A)
    assert await pinned() == (True, False, True)
    await cluster.administration.pin(C)
    cluster.administration.unpin(A)
    assert await pinned() == (False, True, True)
    await cluster.administration.pin(A)
    await cluster.administration.unload(C, wait=False)
    assert ((await listed(cluster))["a"].pinned, cluster.replica.pool.get("same").pinned) == (True, True)
    await cluster.answer(1, adapter="c")
    cluster.administration.unpin(A)
    await cluster.administration.pin("same")  # by its content: under all of its names
    assert await pinned() == (True, True, True)
    await cluster.administration.unload(C, wait=False)
    assert (await listed(cluster))["a"].pinned
    await cluster.answer(1, adapter="c")
    cluster.administration.unpin("same")
    assert await pinned() == (False, False, False)


async def test_two_names_of_one_content_are_counted_each_by_itself(cluster: Cluster):
    await same_content(cluster)
    running = [await cluster.service.generate(request(1, 100, name)) for name in "aac"]
    statuses = await listed(cluster)
    for name, count in ("a", 2), ("c", 1):
        status = statuses[name]
        (residence,) = status.residences
        assert status.requests == status.running_sequences + status.waiting_sequences == count
        assert residence.running_sequences + residence.waiting_sequences == count
    for generation in running:
        cluster.service.requests.close(generation)


@pytest.mark.parametrize(("asked", "meant"), [("poets", "poet"), ("Poet", "poet"), ("org/poet", "poet"), ("xyz", None)])
async def test_an_unknown_name_is_answered_with_a_suggestion(cluster: Cluster, asked: str, meant: str | None):
    cluster.replica.shards.absent.add(asked)
    cluster.replica.shards.local = [LocalAdapter("poet"), LocalAdapter("sql"), LocalAdapter("poetry", "cut short")]
    with pytest.raises(AdapterNotFoundError) as missing:
        await cluster.answer(1, adapter=asked)
    assert missing.value.message == f"no {asked}" + (f"; did you mean {meant!r}?" if meant else "")


async def test_only_names_that_the_caller_may_use_are_suggested(cluster: Cluster):
    cluster.replica.shards.absent.add("sqls")
    cluster.replica.shards.local = [LocalAdapter("sql"), LocalAdapter("sql2")]
    tenant = TenantSettings(keys=[sha256(b"key").hexdigest()], adapters=["sql2", "sqls"])
    cluster.service.keys = Keys({"acme": tenant})
    with pytest.raises(AdapterNotFoundError, match=r"no sqls; did you mean 'sql2'\?$"):
        await cluster.service.generate(request(1, 1, "sqls"), key="key")


@pytest.mark.parametrize("name", ["a,b", ".hidden", "../a", "a/b/c/d/e", "tab\there", " a", "x" * 300])
async def test_an_invalid_name_is_refused_with_the_rule(cluster: Cluster, name: str):
    with pytest.raises(InvalidRequestError, match="a name has 1 to 4 parts separated by /"):
        await cluster.answer(1, adapter=name)


async def test_an_adapter_with_the_models_own_name_is_listed_with_a_warning(cluster: Cluster):
    cluster.replica.shards.local = [LocalAdapter(cluster.service.info.model_id)]
    ((status,), _) = await cluster.service.adapters.list()
    assert "means the base model" in status.warnings[0]


def test_suggestions_are_fast_among_thousands_of_names() -> None:
    names = [f"customer-{number:05}" for number in range(10_000)]
    for asked in ("customr-00042", "CUSTOMER-00042", "customer-00042x", "custmer-00042"):
        assert similar(asked, names)[0] == "customer-00042"


async def test_a_flood_of_unknown_names_lists_adapters_once_and_compares_names_one_at_a_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    shards, names = cluster.replica.shards, [f"nobody{number}" for number in range(100)]
    shards.absent.update(names)
    compares, release, compared, listed_times = 0, threading.Event(), list[str](), 0
    several = False
    list_local = shards.local_adapters

    async def count() -> list[LocalAdapter]:
        nonlocal listed_times
        listed_times += 1
        await asyncio.sleep(0.01)
        return await list_local()

    def compare(name: str, known: Iterable[str]) -> list[str]:
        nonlocal compares, several
        compares += 1
        several |= compares > 1
        release.wait(60)
        compares -= 1
        compared.append(name)
        return ["a"]

    monkeypatch.setattr(shards, "local_adapters", count)
    monkeypatch.setattr(suggestions, "similar", compare)
    asked = [asyncio.create_task(cluster.answer(1, adapter=name)) for name in names]
    done, _ = await asyncio.wait(asked, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    while len(done) < len(asked) - suggestions.MOST_WAITING:
        done, _ = await asyncio.wait(asked, timeout=0.01)
    assert all("did you mean" not in str(task.exception()) for task in done)
    for task in asked:  # who leaves does not let the next one begin
        task.cancel()
    await asyncio.wait(asked)
    assert (listed_times, compared, compares) == (1, [], 1)
    release.set()
    async with asyncio.timeout(60):
        while len(compared) < suggestions.MOST_WAITING:
            await asyncio.sleep(0.01)
    assert not several
    with pytest.raises(AdapterNotFoundError, match="did you mean 'a'"):
        await cluster.answer(1, adapter=names[0])


def test_composed_and_decomposed_umlauts_are_the_same_name() -> None:
    nfc, nfd = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    assert AdapterReference(nfd) == AdapterReference(nfc)
    tenant = Tenant("acme", Allowance(adapters=[f"{nfd}*"]))
    assert tenant.may_use(AdapterReference(nfc).id)


async def test_pages_together_are_the_whole_listing(cluster: Cluster):
    names = [f"adapter-{number:05}" for number in range(2000)]
    shards = cluster.replica.shards
    shards.local = [LocalAdapter(name) for name in names]
    await cluster.answer(1, adapter=names[1])
    await cluster.administration.load(AdapterReference(names[1], "local"))  # the same id again
    whole, more = await cluster.administration.listing.page()
    assert (len(whole), more) == (2001, False)
    for limit in 1, 2, 700, 2000, 2001, 5000:
        found, after, pages = [], "", 0
        while True:
            page, more = await cluster.administration.listing.page(after=after, limit=limit)
            found, pages = [*found, *page], pages + 1
            if not more:
                break
            assert len(page) >= limit
            after = page[-1].id
            if pages == 3 and limit < 3:  # enough of those
                break
        assert [(each.id, each.source) for each in found] == [(each.id, each.source) for each in whole[: len(found)]]
    assert not (await cluster.administration.listing.page(after="zzz", limit=5)).adapters
    sevens = Tenant("acme", Allowance(adapters=["*7"]))
    only = await cluster.administration.listing.page(sevens, after="adapter-00100", limit=2)
    assert [each.id for each in only.adapters] == ["adapter-00107", "adapter-00117"]


async def test_later_pages_do_not_ask_the_shards_again(cluster: Cluster):
    shards = cluster.replica.shards
    shards.local = [LocalAdapter("a"), LocalAdapter("c")]
    first = await cluster.administration.listing.page(limit=1)
    shards.local = [LocalAdapter("a"), LocalAdapter("b"), LocalAdapter("c")]
    second = await cluster.administration.listing.page(after="a", limit=1)
    assert [each.id for each in (*first.adapters, *second.adapters)] == ["a", "c"]
    assert [each.id for each in (await cluster.administration.listing.page()).adapters] == ["a", "b", "c"]


async def test_those_who_list_while_the_directory_is_listed_wait_for_the_next_listing_together(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    shards, listing, asked = cluster.replica.shards, cluster.administration.listing, 0
    release = asyncio.Event()

    async def list_local() -> list[LocalAdapter]:
        nonlocal asked
        asked += 1
        found = list(shards.local)
        await release.wait()
        return found

    monkeypatch.setattr(shards, "local_adapters", list_local)
    first = asyncio.create_task(listing.page())
    while not asked:
        await asyncio.sleep(0)
    shards.local = [LocalAdapter("new"), LocalAdapter("newer")]
    others = [asyncio.create_task(listing.page(only="new")) for _ in range(50)]
    others.append(asyncio.create_task(listing.page(only="absent")))
    await asyncio.sleep(0)
    others[0].cancel()
    release.set()
    assert [each.id for each in (await first).adapters] == ["a", "b", "broken"]
    pages = await asyncio.gather(*others[1:])
    assert [[each.id for each in page.adapters] for page in pages] == [["new"]] * 49 + [[]]
    assert asked == 2


async def test_a_listing_without_a_replica_is_an_error(cluster: Cluster):
    cluster.replica.stopping = True
    with pytest.raises(UnavailableError, match="no replica is ready"):
        await cluster.administration.listing.page()
