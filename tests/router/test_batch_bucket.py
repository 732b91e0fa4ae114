"""Batches in a bucket: whoever dies, hangs or writes late, every line has one answer."""

import asyncio
import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from loraplex_protos.errors import BatchNotFoundError, InvalidRequestError, UnavailableError
from loraplex_router.batches import batches, bucket_job, layout, lease, objects
from loraplex_router.batches.bucket import BatchBucket
from loraplex_router.batches.job import TakenOverError
from loraplex_router.batches.lease import Lease
from loraplex_router.batches.objects import ConflictError, Objects
from loraplex_router.batches.opening import open_batches
from loraplex_router.batches.reading import Line
from loraplex_router.batches.records import BatchRecord, Status
from loraplex_router.settings import EdgeSettings
from tests.router.test_batches import ENDPOINT, World, create, ended, line, rows, text
from tests.stand_in_stores import StandInAzure, StandInGCS, StandInS3, StandInStore

URL = "s3://bucket/team"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInS3]:
    monkeypatch.setattr(BatchBucket, "look_seconds", 0.05)
    with StandInS3(monkeypatch) as store:
        yield store


class Clock:
    """Instead of `monotonic` in `lease.py`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(lease, "monotonic", lambda: self.now)


def bucket() -> BatchBucket:
    return BatchBucket(URL, 1 << 20)


def impatient(monkeypatch: pytest.MonkeyPatch) -> Objects:
    """The same objects, for the time during which the store hangs."""
    with monkeypatch.context() as context:
        context.setattr(objects, "TIMEOUT", 0.3)
        return Objects(URL)


def written(store: BatchBucket, lines: int) -> BatchRecord:
    """A batch of a tenant without a name."""
    file = store.add_file("", "in.jsonl", "batch", io.BytesIO(text(*map(line, range(lines)))))
    return store.add_batch("", file.id, ENDPOINT, "24h", None)


def running(store: BatchBucket, id: str) -> bucket_job.BucketJob:
    job = store.job("", id)
    assert job is not None and job.begin(10_000)
    return job


def bucket_of(world: World) -> BatchBucket:
    assert isinstance(world.batches, BatchBucket)
    return world.batches


def answer(job: bucket_job.BucketJob, *numbers: int, status: int = 200) -> None:
    for number in numbers:
        body = {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}
        job.add(Line(f"line {number}", ENDPOINT, {}), status, "r", body)


def answered(store: BatchBucket, file_id: str | None) -> list[str]:
    if file_id is None:
        return []
    content = store.content("", file_id)
    return [json.loads(row)["custom_id"] for row in b"".join(content).splitlines()]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [StandInS3, StandInGCS, StandInAzure])
def test_objects_are_replaced_only_by_those_who_know_them(
    kind: type[StandInStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PIECE", 5 << 20)
    with kind(monkeypatch) as store:
        place = Objects(f"{store.scheme}://bucket/team")
        first = place.replace("a/b", b"1", None)
        second = place.replace("a/b", b"2", first)
        for version in (None, first):
            with pytest.raises(ConflictError):
                place.replace("a/b", b"3", version)
        with pytest.raises(ConflictError):
            place.replace("absent", b"3", second)
        found = place.find("a/b")
        assert found and found.content == b"2" and place.replace("a/b", b"4", found.version) != second
        large = b"x" * (5 << 20) + b"y"
        place.upload("a/large", iter([large[:10], large[10:]]))
        place.upload("a/file", io.BytesIO(b"small"))
        assert b"".join(place.read("a/large", 3 << 20)) == large
        assert [(each.path, each.size) for each in place.list("a")] == [
            ("a/b", 1),
            ("a/file", 5),
            ("a/large", len(large)),
        ]
        assert [path for path, _ in place.find_all(["a/file", "absent", "a/b"])] == ["a/file", "a/b"]
        place.delete(["a/b", "absent", "a/file", "a/large"])
        assert not list(place.list("")) and place.find("a/b") is None and place.modified("a/b") is None
        assert not store.objects.uploads


def test_a_router_that_writes_late_neither_repeats_nor_loses_a_line(s3: StandInS3) -> None:
    one, other = bucket(), bucket()
    record = written(one, 6)
    late = running(one, record.id)
    answer(late, 0, 1)
    late.save()
    heir = running(other, record.id)
    assert [each.custom_id for each in heir.remaining()] == [f"line {n}" for n in range(2, 6)]
    answer(heir, 2)
    answer(late, 2, 3)
    answer(late, 4, status=500)
    with pytest.raises(TakenOverError):
        late.save()  # its answers are there, but not its record
    answer(heir, 3, 4)
    answer(heir, 5, status=400)
    heir.finish(Status.COMPLETED)
    with pytest.raises(TakenOverError):
        late.finish(Status.COMPLETED)
    done = one.batch("", record.id)
    assert done.status is Status.COMPLETED
    assert sorted(answered(one, done.output_file_id)) == [f"line {n}" for n in range(5)]
    assert answered(one, done.error_file_id) == ["line 5"]
    assert (done.request_counts.completed, done.request_counts.failed, done.usage.output_tokens) == (5, 1, 12)
    kept = {each.id for each in one.files("")}
    assert kept == {done.input_file_id, done.output_file_id, done.error_file_id}
    assert not [name for name in s3.objects if "/open/" in name] and one.unfinished() == []


def test_a_router_that_ends_a_batch_after_another_one_did_deletes_its_files(
    s3: StandInS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = bucket(), bucket()
    record = written(one, 2)
    late = running(one, record.id)
    answer(late, 0, 1)
    upload = one.upload

    def stopped(*arguments: Any) -> None:
        """Another router takes over while the file is on its way."""
        upload(*arguments)
        running(other, record.id).finish(Status.COMPLETED)

    monkeypatch.setattr(one, "upload", stopped)
    with pytest.raises(TakenOverError):
        late.finish(Status.COMPLETED)
    done = one.batch("", record.id)
    assert done.status is Status.COMPLETED and sorted(answered(one, done.output_file_id)) == ["line 0", "line 1"]
    assert {each.id for each in one.files("")} == {done.input_file_id, done.output_file_id}
    assert len([name for name in s3.objects if "/contents/" in name]) == 2


def test_answers_in_many_parts_are_put_together(s3: StandInS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_job, "MOST_ROWS", 2)
    store = bucket()
    record = written(store, 70)
    job = running(store, record.id)
    answer(job, *range(60))
    job.finish(Status.EXPIRED)
    done = store.batch("", record.id)
    assert sorted(answered(store, done.output_file_id)) == sorted(f"line {n}" for n in range(60))
    assert answered(store, done.error_file_id) == [f"line {n}" for n in range(60, 70)]
    assert (done.request_counts.completed, done.request_counts.failed) == (60, 10)


def test_what_a_crashed_router_has_put_together_is_put_together_again(
    s3: StandInS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = bucket()
    record = written(store, 3)
    job = running(store, record.id)
    answer(job, 0, 1)
    monkeypatch.setattr(job, "end", lambda _: None)  # it crashed before
    job.finish(Status.COMPLETED)
    again = running(store, record.id)
    assert [each.custom_id for each in again.remaining()] == ["line 2"]
    again.finish(Status.EXPIRED)
    done = store.batch("", record.id)
    assert done.status is Status.EXPIRED and len(answered(store, done.output_file_id)) == 2
    assert answered(store, done.error_file_id) == ["line 2"] and len(store.files("")) == 3


def test_a_write_that_was_done_though_nobody_said_so_is_known_again(
    s3: StandInS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = bucket()
    record = written(store, 2)
    job = running(store, record.id)
    answer(job, 0)
    replace = store.objects.replace

    def unanswered(*arguments: Any) -> Any:
        replace(*arguments)
        raise UnavailableError("no answer")

    monkeypatch.setattr(bucket_job, "PAUSE", 0.0)
    with monkeypatch.context() as context:
        context.setattr(store.objects, "replace", unanswered)
        with pytest.raises(UnavailableError):
            job.save()
    answer(job, 1)
    job.finish(Status.COMPLETED)
    assert Counter(answered(store, store.batch("", record.id).output_file_id)) == {"line 0": 1, "line 1": 1}


def test_a_lease_is_one_routers_until_it_cannot_renew_it(s3: StandInS3, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 3600.0)  # it is stopped, as by SIGSTOP
    one, other = Lease(Objects(URL), "lease"), Lease(Objects(URL), "lease")
    assert one.take() and one.held and not other.take()
    clock.now += lease.HELD_SECONDS
    assert not one.held and not other.take()
    clock.now += lease.STALE_SECONDS - lease.HELD_SECONDS - 0.1
    assert not other.take()
    clock.now += 0.2
    assert other.take() and other.held
    one._released.set()
    assert one._renewing
    one._renewing.join()
    assert not one.take()
    other.release()
    assert not other.held and one.take()  # at once
    one.release()


def test_a_lease_that_is_renewed_stays_and_ends_when_the_store_hangs(
    s3: StandInS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    place = Objects(URL)
    one = Lease(place, "lease")
    assert one.take()
    until = one._held_until
    clock.now += lease.HELD_SECONDS / 2
    while one._held_until == until:
        time.sleep(0.01)
    s3.hang()
    one._objects = impatient(monkeypatch)
    clock.now += 2 * lease.HELD_SECONDS
    assert one._renewing
    one._renewing.join(60)
    assert not one.held and not one._renewing.is_alive()
    s3.release()
    one._objects = place
    assert one.take()  # nobody else has taken it
    one.release()


def test_a_bucket_that_is_not_there_is_said_to_be_missing(s3: StandInS3) -> None:
    s3.failure = 404
    for call in (bucket().lock, bucket().unfinished, lambda: written(bucket(), 1), lambda: bucket().batches("")):
        with pytest.raises(UnavailableError, match="the bucket of batches in S3 does not exist"):
            call()


def test_a_store_that_ignores_conditions_runs_no_batches(s3: StandInS3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.conditional = False
    with pytest.raises(UnavailableError, match="ignores conditions"):
        bucket().lock()
    assert not s3.objects


async def test_a_store_that_hangs_or_refuses_is_unavailable_and_batches_go_on_later(
    s3: StandInS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_router.batches.runner.LONGEST_WAIT", 0.1)
    world = World(URL)
    client = world.client()
    world.setup.shards.loads_held.clear()  # lines of the adapter wait
    body = {"model": "a", "prompt": "A", "max_tokens": 5, "temperature": 0}
    async with world.running():
        batch = await create(client, text(*(line(n, body=body) for n in range(20))))
        async with asyncio.timeout(60):
            while (await client.batches.retrieve(batch.id)).status != "in_progress":
                await asyncio.sleep(0.05)
        place = bucket_of(world).objects
        s3.hang()
        bucket_of(world).objects = impatient(monkeypatch)
        for call in (
            client.batches.list(),
            client.batches.retrieve(batch.id),
            client.files.content(batch.input_file_id),
        ):
            with pytest.raises(
                openai.InternalServerError, match=r"bucket of batches in S3 .* does not answer"
            ) as refused:
                await call
            assert refused.value.status_code == 503
        world.setup.shards.loads_held.set()
        assert (await client.completions.create(model="base", prompt="A", max_tokens=2)).choices  # others do not wait
        s3.release()
        bucket_of(world).objects = place
        s3.failure = 500
        with pytest.raises(openai.InternalServerError, match="answers 500"):
            await client.files.create(file=("in.jsonl", io.BytesIO(text(line(1)))), purpose="batch")
        s3.failure = None
        batch = await ended(client, batch)
        found = await rows(client, batch.output_file_id)
    assert sorted(row["custom_id"] for row in found) == sorted(f"line {n}" for n in range(20))


async def test_a_router_that_was_stopped_leaves_its_batch_to_the_one_that_took_it_over(
    s3: StandInS3, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "loraplex_router.batches")
    world = World(URL)
    client = world.client()
    world.setup.shards.loads_held.clear()  # lines of the adapter wait
    body = {"model": "a", "prompt": "A", "max_tokens": 5, "temperature": 0}
    async with world.running():
        batch = await create(client, text(*(line(n, body=body) for n in range(20))))
        async with asyncio.timeout(60):
            while "20 of 20 lines remain" not in caplog.text:
                await asyncio.sleep(0.05)
        await asyncio.to_thread(running, bucket(), batch.id)  # by a router that took over while this one was stopped
        world.setup.shards.loads_held.set()
        batch = await ended(client, batch)
    assert f"batch {batch.id}: another router runs it now" in caplog.text and "Traceback" not in caplog.text
    assert batch.request_counts.completed == 20


def test_files_are_counted_and_old_objects_deleted_by_the_stores_clock(
    s3: StandInS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BatchBucket(URL, 1000)
    old = store.add_file("", "old.jsonl", "batch", io.BytesIO(b"x" * 600))
    with pytest.raises(InvalidRequestError, match="no room"):
        store.add_file("", "new.jsonl", "batch", io.BytesIO(b"x" * 600))
    store.delete_expired()
    with pytest.raises(InvalidRequestError, match="no room"):  # another router counts by what the store says
        BatchBucket(URL, 1000).add_file("", "new.jsonl", "batch", io.BytesIO(b"x" * 600))
    store.objects.put("adapters/theirs", b"somebody else's")
    for name in s3.objects:
        s3.objects.age(name, batches.FILE_SECONDS + 60)
    new = store.add_file("other", "new.jsonl", "batch", io.BytesIO(b"x" * 200))
    store.delete_expired()
    with pytest.raises(BatchNotFoundError):
        store.file("", old.id)
    assert not [name for name in s3.objects if old.id in name] and "bucket/team/adapters/theirs" in s3.objects
    assert store.file("other", new.id).bytes == 200
    store.delete_file("other", new.id)
    store.add_file("", "newer.jsonl", "batch", io.BytesIO(b"x" * 1000))


def test_lists_read_only_what_has_changed(s3: StandInS3) -> None:
    store = bucket()
    ids = [written(store, 1).id for _ in range(3)]
    assert {each.id for each in store.batches("")} == set(ids)
    s3.requests.clear()
    assert len(store.batches("")) == 3 and not [each for each in s3.requests if each.startswith("GET")]
    running(store, ids[0]).finish(Status.CANCELLED)
    s3.requests.clear()
    assert {each.status for each in store.batches("")} == {Status.VALIDATING, Status.CANCELLED}
    assert [each for each in s3.requests if each.startswith("GET")] == [f"GET bucket/team/{layout.batch('', ids[0])}"]


def test_a_batch_without_its_input_fails_and_one_without_a_record_is_forgotten(s3: StandInS3) -> None:
    store = bucket()
    record = written(store, 1)
    s3.objects.pop(next(name for name in s3.objects if "/contents/" in name))
    job = store.job("", record.id)
    assert job and not job.begin(10_000)
    failed = store.batch("", record.id)
    assert failed.status is Status.FAILED and failed.errors and failed.errors.data[0].code == "input_file_not_found"
    lost = written(store, 1).id  # its router died
    s3.objects.pop(f"bucket/team/{layout.batch('', lost)}")
    assert store.job("", lost) is None and store.unfinished() == [("", lost)]
    s3.objects.age(f"bucket/team/open/{lost}", 7200)
    assert store.job("", lost) is None and store.unfinished() == []


async def test_a_large_file_is_read_in_pieces_and_a_piece_that_breaks_off_again(
    s3: StandInS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PAUSE", 0.01)
    world = World(URL, most_bytes=30 << 20)
    client, content = world.client(), text(line(1)) * 100_000
    file = await client.files.create(file=("Füße.jsonl", content), purpose="batch")
    assert file.bytes == len(content) > objects.PIECE
    s3.cut = 1000
    assert (await client.files.content(file.id)).content == content
    assert world.batches.delete_file("", file.id) is None
    with pytest.raises(openai.NotFoundError):
        await client.files.content(file.id)


@pytest.mark.parametrize("where", ["s3://", "s3://B", "http://bucket", "s3://bucket//a", "gs://bucket/../a", "s3:// b"])
def test_what_names_no_bucket_is_refused(where: str) -> None:
    with pytest.raises(ValueError, match="must be a folder, or a bucket: s3://BUCKET/PREFIX"):
        EdgeSettings(batches=where)


def test_a_bucket_that_cannot_be_opened_is_named_with_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", "{}")
    with pytest.raises(OSError, match=r"^--batches: gs://bucket: "):
        open_batches(EdgeSettings(batches="gs://bucket").batches, 1)
