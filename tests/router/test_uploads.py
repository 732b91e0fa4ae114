"""Uploaded adapters: versions, limits, and replacement many times a minute beside running sequences."""

import asyncio
import gc
from collections.abc import AsyncIterator, MutableMapping
from functools import partial
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos.errors import (
    AdapterConflictError,
    AdapterInvalidError,
    AdapterNotFoundError,
    ForbiddenError,
    InvalidRequestError,
    OverloadedError,
    RateLimitedError,
    UnavailableError,
)
from loraplex_protos.generation_pb2 import ADAPTER_TIER_DEVICE as DEVICE
from loraplex_router.access.keys import TenantSettings
from loraplex_router.api.http.multipart import split_files
from loraplex_router.api.uploads import receive
from loraplex_router.replicas import uploads
from loraplex_router.replicas.replica import Replica
from loraplex_router.replicas.uploads import Announcement
from loraplex_router.vocabulary.adapter import StagedAdapter
from loraplex_router.vocabulary.references import AdapterReference, MergedReference
from loraplex_router.vocabulary.request import Request
from tests.router.fake_shards import FakeShards
from tests.router.test_keys import ADMIN_KEY, OLD_KEY, hashed
from tests.router.test_registry import read_content
from tests.router.test_replicas import Cluster, request


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    await made.close()


async def upload(
    cluster: Cluster, content: bytes, name: str = "policy", expected: int | None = None, **key: str
) -> int:
    """Returns the version."""

    async def read() -> dict[str, memoryview]:
        return {"adapter_model.safetensors": memoryview(content)}

    announced = Announcement(name, len(content), expected)
    status = await cluster.service.adapters.upload(announced, read, **key)
    id, _, version = status.id.partition("@")
    assert (id, status.source) == (name, "upload")
    return int(version)


async def settled(cluster: Cluster, digests: int) -> None:
    """Waits until what was replaced is gone; each replica then holds this many adapters."""
    async with asyncio.timeout(10):
        while cluster.administration._working:
            await asyncio.sleep(0)
    assert all(len(list(replica.pool)) == digests for replica in cluster.replicas)


async def test_an_upload_is_on_every_replica_and_answers_at_once(cluster: Cluster):
    second = cluster.join("second")
    version = await upload(cluster, b"one")
    assert cluster.replica.shards.log.count("upload") == second.shards.log.count("upload") == 1
    generation = await cluster.service.generate(request(1, 3, "policy"))
    await generation.collect()
    cluster.service.requests.close(generation)
    assert generation.adapter_version == f"policy@{version}"


async def test_a_replica_that_joins_later_gets_the_upload(cluster: Cluster):
    await upload(cluster, b"one")
    second = cluster.join("second")
    cluster.lose(cluster.replica)
    assert len(await cluster.answer(1, adapter="policy")) == 5
    assert "upload" in second.shards.log


async def test_a_newer_version_answers_new_requests_and_running_ones_keep_theirs(cluster: Cluster):
    first = await upload(cluster, b"one")
    running = await cluster.service.generate(request(1, 150, "policy"))
    second = await upload(cluster, b"two")
    assert second > first
    latest = await cluster.service.generate(request(1, 1, "policy"))
    await latest.collect()
    cluster.service.requests.close(latest)
    assert latest.adapter_version == f"policy@{second}"
    with pytest.raises(AdapterNotFoundError, match=f"its versions: {second}"):
        await cluster.service.generate(request(1, 1, f"policy@{first}"))
    (delta,) = await running.collect()
    assert len(delta.samples) == 150
    assert running.adapter_digest != latest.adapter_digest
    cluster.service.requests.close(running)
    await settled(cluster, 1)


async def test_a_pinned_name_stays_pinned_when_it_is_replaced(cluster: Cluster):
    policy = AdapterReference("policy")
    for content in (b"one", b"two", b"two"):
        version = await upload(cluster, content)
        await cluster.service.adapters.pin(policy) if content == b"one" else await settled(cluster, 1)
        (status,) = [each for each in (await cluster.administration.listing.page()).adapters if "@" in each.id]
        assert (status.id, status.pinned, status.tier) == (f"policy@{version}", True, DEVICE)
    await cluster.service.adapters.unpin(policy)
    await upload(cluster, b"three")
    await settled(cluster, 1)
    assert not cluster.pool.pinned


async def test_running_sequences_of_a_replaced_version_survive_their_replica(cluster: Cluster):
    await upload(cluster, b"one")
    running = await cluster.service.generate(request(1, 100, "policy"))
    while running.outputs[0].generated < 5:
        await asyncio.sleep(0)
    await upload(cluster, b"two")
    cluster.join("second")
    cluster.lose(cluster.replica)
    (delta,) = await running.collect()
    assert len(delta.samples) == 100
    cluster.service.requests.close(running)


async def test_nothing_is_left_of_a_thousand_swaps(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uploads, "BURST", 2000)
    monkeypatch.setattr(cluster.uploads, "_allowance", 2000.0)
    running = await cluster.service.generate(request(1, 150))
    for number in range(1000):
        await upload(cluster, b"%d" % number)
        if number % 100 == 0:
            await cluster.answer(1, tokens=2, adapter="policy")
    await running.collect()
    cluster.service.requests.close(running)
    await settled(cluster, 1)
    gc.collect()
    assert len(list(cluster.resolutions)) == 1
    assert cluster.uploads._free == 1000 - len(b"999")
    assert (
        len([status for status in (await cluster.administration.listing.page()).adapters if "policy" in status.id]) == 2
    )
    assert list(cluster.telemetry._labels) == ["[base]", "policy"]


async def test_the_same_bytes_again_are_a_version_that_shares_the_memory(cluster: Cluster):
    first, second = await upload(cluster, b"one"), await upload(cluster, b"one")
    assert first < second
    await asyncio.sleep(0.01)
    assert len(list(cluster.pool)) == 1
    assert len(await cluster.answer(1, adapter="policy")) == 5


async def test_a_name_is_replaced_only_if_it_is_as_expected(cluster: Cluster):
    with pytest.raises(AdapterConflictError, match="is not registered"):
        await upload(cluster, b"one", expected=7)
    version = await upload(cluster, b"one", expected=0)
    with pytest.raises(AdapterConflictError, match=f"has version {version} now"):
        await upload(cluster, b"two", expected=0)
    assert await upload(cluster, b"two", expected=version) > version


async def test_of_two_that_expect_the_same_version_one_is_told(cluster: Cluster):
    version = await upload(cluster, b"one")
    outcomes = await asyncio.gather(
        upload(cluster, b"two", expected=version), upload(cluster, b"three", expected=version), return_exceptions=True
    )
    assert sorted(type(outcome) for outcome in outcomes if isinstance(outcome, Exception)) == [AdapterConflictError]
    await settled(cluster, 1)
    assert len(await cluster.answer(1, adapter="policy")) == 5


async def test_a_slower_upload_does_not_replace_a_newer_one(cluster: Cluster):
    cluster.shards.stages_held.clear()
    slow = asyncio.create_task(upload(cluster, b"slow"))
    await asyncio.sleep(0.01)
    second = cluster.join("second")
    cluster.replica.silent = True
    fast = await upload(cluster, b"fast")
    cluster.shards.stages_held.set()
    with pytest.raises(AdapterConflictError, match=f"has version {fast} now"):
        await slow
    assert second.shards.log.count("upload") >= 1


async def test_what_cannot_be_served_changes_nothing(cluster: Cluster):
    version = await upload(cluster, b"one")
    with pytest.raises(AdapterInvalidError):
        await upload(cluster, b"broken")
    assert await upload(cluster, b"two", expected=version) > version


@pytest.mark.parametrize("name", ["", "a,b", "../x", "x@1", "x" * 600])
async def test_a_name_that_no_request_could_use_is_refused(cluster: Cluster, name: str):
    with pytest.raises(InvalidRequestError, match="name"):
        await upload(cluster, b"one", name)


async def test_a_name_that_would_mean_something_else_after_a_restart_is_refused(cluster: Cluster):
    with pytest.raises(AdapterConflictError, match="the adapter directory has 'a'"):
        await upload(cluster, b"one", "a")
    cluster.registry.update(read_content({"adapters": {"policy": {1: {"id": "a"}}}}))
    with pytest.raises(AdapterConflictError, match="declared in the registry file"):
        await upload(cluster, b"one")


async def test_a_name_that_the_file_declares_later_is_the_files(cluster: Cluster):
    await upload(cluster, b"one")
    for version in cluster.registry.update(read_content({"adapters": {"policy": {1: {"id": "a"}}}})):
        cluster.administration.retire(version)
    generation = await cluster.service.generate(request(1, 1, "policy"))
    await generation.collect()
    cluster.service.requests.close(generation)
    assert generation.adapter_version == "policy@1"


async def test_uploads_take_no_more_memory_than_they_may(cluster: Cluster):
    with pytest.raises(InvalidRequestError, match="--adapter-uploads-mib"):
        await upload(cluster, bytes(1001))
    await upload(cluster, bytes(600))
    with pytest.raises(OverloadedError, match="400 are free"):
        await upload(cluster, bytes(500), "other")
    with pytest.raises(AdapterInvalidError):
        await upload(cluster, b"broken")
    await cluster.service.adapters.remove("policy", None)
    await settled(cluster, 0)
    gc.collect()
    await upload(cluster, bytes(1000), "other")


async def test_a_version_that_is_removed_while_its_replica_is_lost_is_forgotten(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    version = await upload(cluster, b"one")

    async def lost(digest: str) -> None:
        raise UnavailableError("the connection was closed")

    monkeypatch.setattr(cluster.shards, "unstage", lost)
    await cluster.service.adapters.remove("policy", version)
    assert await asyncio.gather(*cluster.administration._working) == [None]


async def test_an_upload_that_only_a_lost_replica_has_is_to_be_sent_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    staged = list[Replica]()

    async def stage(replica: Replica, *upload: Any) -> StagedAdapter:
        if staged:
            cluster.tasks.pop(staged[0]).cancel()
            cluster.replicas.remove(staged[0])
            raise UnavailableError("it hangs")
        staged.append(replica)
        return await FakeShards.upload(replica.shards, *upload)

    for replica in cluster.replica, cluster.join("second"):
        monkeypatch.setattr(replica.shards, "upload", partial(stage, replica))
    with pytest.raises(UnavailableError, match="was lost: send the request again"):
        await upload(cluster, b"one")
    assert len(staged) == 1 and cluster.registry.find("policy") is None
    monkeypatch.undo()
    await upload(cluster, b"one")


async def test_uploads_have_a_rate(cluster: Cluster):
    for number in range(uploads.BURST):
        await upload(cluster, b"%d" % number)
    with pytest.raises(RateLimitedError):
        for number in range(uploads.BURST):
            await upload(cluster, b"again %d" % number)


async def test_a_clock_that_is_put_back_refuses_no_upload(cluster: Cluster):
    await upload(cluster, b"one")
    cluster.uploads._clock = lambda: 1.0
    await upload(cluster, b"two")


async def test_a_removed_name_is_unknown_and_its_sequences_end_as_they_would(cluster: Cluster):
    version = await upload(cluster, b"one")
    running = await cluster.service.generate(request(1, 100, "policy"))
    with pytest.raises(AdapterConflictError):
        await cluster.service.adapters.remove("policy", 7)
    await cluster.service.adapters.remove("policy", version)
    cluster.shards.absent.add("policy")
    with pytest.raises(AdapterNotFoundError):
        await cluster.service.generate(request(1, 1, "policy"))
    with pytest.raises(AdapterNotFoundError, match="no adapter 'policy' has been uploaded"):
        await cluster.service.adapters.remove("policy", None)
    (delta,) = await running.collect()
    assert len(delta.samples) == 100
    cluster.service.requests.close(running)


async def test_to_merge_an_upload_it_is_sent_again(cluster: Cluster):
    await upload(cluster, b"one")
    merged = MergedReference((AdapterReference("policy"), AdapterReference("a")))
    generation = await cluster.service.generate(Request((1,), adapter=merged, max_new_tokens=1))
    await generation.collect()
    cluster.service.requests.close(generation)
    digest = sha256(b"one").hexdigest()
    place = cluster.shards.log.index(f"merge {digest},digest of a")
    assert cluster.shards.log[place + 1] == f"sent adapter_model.safetensors of {digest}"


async def test_only_administrators_upload_and_remove():
    tenants = {
        "acme": TenantSettings(keys=[hashed(OLD_KEY)]),
        "operator": TenantSettings(keys=[hashed(ADMIN_KEY)], admin=True),
    }
    cluster = Cluster(tenants)
    with pytest.raises(ForbiddenError):
        await upload(cluster, b"one", key=OLD_KEY)
    await upload(cluster, b"one", key=ADMIN_KEY)
    with pytest.raises(ForbiddenError):
        await cluster.service.adapters.remove("policy", None, OLD_KEY)
    await cluster.close()


async def test_an_upload_whose_client_leaves_is_no_fault_of_the_server(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
):
    messages = iter([{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}])
    sent = list[MutableMapping[str, Any]]()

    async def receive() -> MutableMapping[str, Any]:
        return next(messages)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-length", b"900"), (b"content-type", b"multipart/form-data; boundary=xyz")]
    scope = {"type": "http", "method": "POST", "path": "/adapters/upload", "query_string": b"name=policy"}
    await cluster.app({**scope, "headers": headers}, receive, send)
    assert sent[0]["status"] == 499 and not [record for record in caplog.records if record.levelname == "ERROR"]
    assert cluster.uploads._free == 1000 and not cluster.registry.has("policy")


async def _parts(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@pytest.mark.parametrize(("parts", "fault"), [((b"ab",), "cut short: 3 of 5"), ((b"abc", b"def"), "more than the 5")])
async def test_an_upload_of_another_size_than_announced_is_refused(parts: tuple[bytes, ...], fault: str):
    with pytest.raises(InvalidRequestError, match=fault):
        await receive(_parts(*parts), 5)


def form(files: dict[str, bytes]) -> bytes:
    head = 'Content-Disposition: form-data; name="f"; filename="{}"\r\nContent-Type: application/octet-stream\r\n\r\n'
    parts = (b"--xyz\r\n" + head.format(name).encode() + data + b"\r\n" for name, data in files.items())
    return b"".join(parts) + b"--xyz--\r\n"


@given(st.dictionaries(st.sampled_from(["a.json", "b", "c/d.jinja"]), st.binary().filter(lambda d: b"xyz" not in d)))
def test_the_files_of_a_form_are_told_apart(files: dict[str, bytes]) -> None:
    found = split_files(memoryview(form(files)), "multipart/form-data; boundary=xyz")
    assert {name: bytes(data) for name, data in found.items()} == files


@given(st.integers(0, 200))
def test_a_form_that_was_cut_short_is_refused(size: int) -> None:
    whole = form({"a.json": b"{}", "b": bytes(20)})
    with pytest.raises(InvalidRequestError, match="cut short"):
        split_files(memoryview(whole[:size]), "multipart/form-data; boundary=xyz")


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=x"])
def test_a_body_that_is_no_form_is_refused(kind: str) -> None:
    with pytest.raises(InvalidRequestError, match="multipart/form-data"):
        split_files(memoryview(form({})), kind)
