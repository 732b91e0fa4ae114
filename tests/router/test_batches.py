"""OpenAI's files and batches, by its own client over shards without a model: nothing is lost, repeated or mixed up."""

import asyncio
import io
import json
import threading
import time
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from loraplex_router.access.keys import TenantSettings
from loraplex_router.api.http.inner_calls import InnerCalls
from loraplex_router.api.http.openai.batches.routes import MOST_UPLOADS, uploads
from loraplex_router.batches import reading
from loraplex_router.batches.batches import THREADS
from loraplex_router.batches.bucket import BatchBucket
from loraplex_router.batches.folder import BatchFolder
from loraplex_router.batches.folder_job import FolderJob
from loraplex_router.batches.job import Job
from loraplex_router.batches.opening import open_batches
from loraplex_router.batches.reading import PIECE, Line
from loraplex_router.batches.records import BatchRecord, new_batch_id, new_file_id
from loraplex_router.batches.runner import BatchRunner
from tests.full_disk import full_disk
from tests.router.test_engine import Setup
from tests.stand_in_stores import StandInS3

ENDPOINT = "/v1/completions"
TENANTS = {name: TenantSettings(keys=[sha256(name.encode()).hexdigest()]) for name in ("one", "two")}
BODY = {"model": "base", "prompt": "A", "max_tokens": 5, "temperature": 0}


def line(number: int, **changes: Any) -> dict[str, Any]:
    return {"custom_id": f"line {number}", "method": "POST", "url": ENDPOINT, "body": BODY} | changes


def text(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


class World:
    """A router with a place for batches, which can be restarted."""

    def __init__(
        self, where: Path | str, most_bytes: int = 1 << 20, tenants: dict[str, TenantSettings] | None = None
    ) -> None:
        self.setup = Setup(tenants=tenants or {})
        self.batches = self.setup.service.batches = open_batches(str(where), most_bytes)
        inner = InnerCalls(self.setup.app, self.setup.service.keys)
        self.runner = BatchRunner(self.batches, inner.post, longest=10_000, max_queue=100)

    def client(self, key: str = "none") -> AsyncOpenAI:
        transport = httpx2.ASGITransport(self.setup.app, raise_app_exceptions=False)
        http = httpx2.AsyncClient(transport=transport, base_url="http://localhost")
        return AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=0)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(each) for each in (self.setup.engine.run(), self.runner.run())]
        try:
            yield
        finally:
            for task in reversed(tasks):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def create(client: AsyncOpenAI, content: bytes, endpoint: Any = ENDPOINT, **options: Any) -> Batch:
    file = await client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options)


async def ended(client: AsyncOpenAI, batch: Batch) -> Batch:
    async with asyncio.timeout(30):
        while (batch := await client.batches.retrieve(batch.id)).status not in ("completed", "failed", "cancelled"):
            await asyncio.sleep(0.05)
    return batch


async def rows(client: AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(each) for each in (await client.files.content(file_id)).text.splitlines()]


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchFolder, "look_seconds", 0.05)
    monkeypatch.setattr(BatchBucket, "look_seconds", 0.05)


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What --batches names."""
    if request.param == "folder":
        yield str(tmp_path)
    else:
        with StandInS3(monkeypatch):
            yield "s3://bucket/team/batches"


async def test_every_line_is_answered_once_as_the_route_itself_answers(place: str) -> None:
    world = World(place)
    client = world.client()
    async with world.running():
        wrong = line(90, body=BODY | {"temperature": -1})
        odd = line(91, custom_id="a line\u2028break, and \x85")
        chosen = line(92, body=BODY | {"model": "a"})
        batch = await create(client, text(*map(line, range(20)), wrong, odd, chosen), metadata={"for": "test"})
        assert batch.status == "validating" and batch.object == "batch"
        batch = await ended(client, batch)
        assert batch.status == "completed" and batch.metadata == {"for": "test"}
        assert batch.request_counts and batch.request_counts.model_dump() == {"total": 23, "completed": 22, "failed": 1}
        found, failed = await rows(client, batch.output_file_id), await rows(client, batch.error_file_id)
        alone = await client.completions.create(**BODY)
    assert sorted(row["custom_id"] for row in found) == sorted(
        [*(f"line {n}" for n in range(20)), odd["custom_id"], "line 92"]
    )
    assert {row["response"]["body"]["choices"][0]["text"] for row in found if row["custom_id"] != "line 92"} == {
        alone.choices[0].text
    }
    assert all(row["response"]["request_id"] and row["response"]["status_code"] == 200 for row in found)
    assert {row["custom_id"]: row["response"]["status_code"] for row in failed} == {"line 90": 400}
    assert failed[0]["response"]["body"]["error"]["message"]
    assert batch.usage and batch.usage.output_tokens == 22 * 5
    assert [file.purpose async for file in client.files.list(purpose="batch_output")] == ["batch_output"] * 2


async def test_a_line_with_more_answers_than_can_ever_wait_is_refused_once(place: str) -> None:
    world = World(place)
    client = world.client()
    async with world.running():
        large = line(1, body=BODY | {"prompt": ["A"] * 17, "n": 3})
        batch = await ended(client, await create(client, text(line(0), large)))
        (failed,) = await rows(client, batch.error_file_id)
    assert failed["custom_id"] == "line 1" and failed["response"]["status_code"] == 400
    assert "asks for 51 answers in all, but at most 50" in failed["response"]["body"]["error"]["message"]
    _, used = await world.setup.service.usage()
    assert [each.requests for _, _, each in used] == [1]


async def test_a_line_may_have_more_inputs_than_can_wait(place: str) -> None:
    world = World(place)
    client = world.client()
    async with world.running():
        body = {"model": "base", "input": [[number] for number in range(300)]}
        large = line(1, url="/v1/embeddings", body=body)
        batch = await ended(client, await create(client, text(large), endpoint="/v1/embeddings"))
        (found,) = await rows(client, batch.output_file_id)
    assert [each["embedding"] for each in found["response"]["body"]["data"]] == [[number] for number in range(300)]


async def test_a_fault_of_the_server_is_an_answer_to_its_line_alone(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(place)
    client, generate_all = world.client(), world.setup.service.generate_all

    async def faulty(requests: Any, *others: Any) -> Any:
        if requests[0].max_new_tokens == 3:
            raise RuntimeError("a fault")
        return await generate_all(requests, *others)

    monkeypatch.setattr(world.setup.service, "generate_all", faulty)
    async with world.running():
        batch = await ended(client, await create(client, text(line(1), line(2, body=BODY | {"max_tokens": 3}))))
        (failed,) = await rows(client, batch.error_file_id)
        assert [row["custom_id"] for row in await rows(client, batch.output_file_id)] == ["line 1"]
    assert failed["custom_id"] == "line 2" and failed["response"]["status_code"] == 500
    assert "a fault" not in json.dumps(failed)


async def test_a_batch_continues_after_a_crash_without_answering_a_line_twice(tmp_path: Path) -> None:
    first = World(tmp_path)
    client = first.client()
    batch = await create(client, text(*map(line, range(300))))
    async with first.running(), asyncio.timeout(30):
        while not 20 < sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("*/files/*/content")) - 300 < 250:
            await asyncio.sleep(0)
    record = first.batches.batch("", batch.id)
    assert record.status == "in_progress" and record.output_file_id
    with first.batches.content("", record.output_file_id).open("ab") as file:
        file.write(b'{"id": "batch_req_1", "custom_id": "line 29')  # the crash came while a line was written
    second = World(tmp_path)
    client = second.client()
    async with second.running():
        batch = await ended(client, batch)
        found = await rows(client, batch.output_file_id)
    assert batch.status == "completed"
    assert sorted(row["custom_id"] for row in found) == sorted(f"line {n}" for n in range(300))
    assert batch.request_counts and batch.request_counts.completed == 300


async def test_only_one_router_runs_the_batches_of_a_folder_and_another_takes_over(place: str) -> None:
    one, other = World(place), World(place)
    async with one.running():
        await asyncio.sleep(0.2)
        assert not other.batches.lock()
        done = await ended(other.client(), await create(other.client(), text(line(1))))
        assert done.status == "completed"
    async with other.running():
        assert (
            await ended(other.client(), await create(other.client(), BOM_UTF8 + text(line(1))))
        ).status == "completed"


@pytest.mark.parametrize(
    ("content", "codes"),
    [
        (b"", [(None, "empty_file")]),
        (b"\n \n", [(None, "empty_file")]),
        (b"{not json\n" + text(line(1)), [(1, "invalid_json_line")]),
        (b"\n[1]\n", [(2, "invalid_json_line")]),
        (text(line(1), line(2, body=json.loads('{"a":' * 300 + "1" + "}" * 300))), [(2, "invalid_json_line")]),
        (text(line(1), line(2), line(1)), [(3, "duplicate_custom_id")]),
        (text(line(1, url="/v1/chat/completions")), [(1, "mismatched_url")]),
        (text(line(1, method="GET"), line(2, body=None)), [(1, "invalid_request"), (2, "invalid_request")]),
        (text(line(1, custom_id=7)), [(1, "invalid_request")]),
        (text(line(1, body=BODY | {"stream": True})), [(1, "invalid_request")]),
        (text(line(1, body=BODY | {"prompt": "A" * 20_000})), [(1, "invalid_request")]),
    ],
)
async def test_an_input_with_a_wrong_line_fails_as_a_whole_and_names_the_line(
    content: bytes, codes: list[tuple[int | None, str]], tmp_path: Path
) -> None:
    world = World(tmp_path)
    client = world.client()
    async with world.running():
        batch = await ended(client, await create(client, content))
    assert batch.status == "failed" and batch.errors and batch.errors.data
    assert [(error.line, error.code) for error in batch.errors.data] == codes


async def test_a_cancelled_batch_keeps_what_it_has_answered(place: str) -> None:
    world = World(place)
    client = world.client()
    world.setup.shards.loads_held.clear()  # lines of the adapter wait
    async with world.running():
        waiting = [line(n, body=BODY | {"model": "a"}) for n in range(10, 20)]
        batch = await create(client, text(line(0), *waiting))
        async with asyncio.timeout(30):
            while not (batch := await client.batches.retrieve(batch.id)).request_counts.completed:
                await asyncio.sleep(0.05)
        assert batch.output_file_id is None  # there is nothing to read yet
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        batch = await ended(client, batch)
        assert batch.status == "cancelled" and batch.cancelled_at and batch.cancelling_at
        assert [row["custom_id"] for row in await rows(client, batch.output_file_id)] == ["line 0"]
        assert (await client.batches.cancel(batch.id)).status == "cancelled"
        world.setup.shards.loads_held.set()


async def test_a_batch_whose_input_is_lost_while_it_runs_fails_with_what_it_has_answered(tmp_path: Path) -> None:
    world = World(tmp_path)
    client = world.client()
    batch = await create(client, text(*map(line, range(3))))
    job = world.batches.job("", batch.id)
    assert job and job.begin(10_000)
    job.add(Line("line 0", ENDPOINT, {}), 200, "r", {"usage": None})
    job.close()
    world.batches.content("", batch.input_file_id).unlink()
    async with world.running(), asyncio.timeout(30):
        while (batch := await client.batches.retrieve(batch.id)).status != "failed":
            await asyncio.sleep(0.05)
        assert batch.errors.data[0].code == "input_file_not_found"
        assert [row["custom_id"] for row in await rows(client, batch.output_file_id)] == ["line 0"]


async def test_a_router_whose_clock_is_wrong_neither_expires_batches_nor_deletes_files(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, right = World(place), time.time
    client = world.client()
    monkeypatch.setattr(time, "time", lambda: right() + 40 * 86400)
    async with world.running():
        batch = await ended(client, await create(client, text(line(1))))
        world.batches.delete_expired()
        assert batch.status == "completed" and await rows(client, batch.output_file_id)
    assert abs(batch.created_at - right()) < 3600


async def test_what_a_batch_could_not_answer_in_a_day_is_in_its_error_file(tmp_path: Path) -> None:
    world = World(tmp_path)
    client = world.client()
    batch = await create(client, text(line(1)))
    record = world.batches.batch("", batch.id)
    record.expires_at = int(time.time()) - 1
    world.batches.write_batch("", record)
    world.setup.engine.run = lambda: asyncio.sleep(3600)  # type: ignore[method-assign]
    async with world.running(), asyncio.timeout(30):
        while (batch := await client.batches.retrieve(batch.id)).status != "expired":
            await asyncio.sleep(0.05)
        (row,) = await rows(client, batch.error_file_id)
    assert row["custom_id"] == "line 1" and row["response"] is None and row["error"]["code"] == "batch_expired"


async def test_tenants_have_files_and_batches_of_their_own_and_their_own_limits(place: str) -> None:
    tenants = TENANTS | {"two": TENANTS["two"].model_copy(update={"adapters": []})}
    world = World(place, tenants=tenants)
    one, two = world.client("one"), world.client("two")
    async with world.running():
        batch = await create(one, text(line(1)))
        for forbidden in (two.batches.retrieve, two.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="no batch"):
                await forbidden(batch.id)
        for forbidden in (two.files.retrieve, two.files.delete, two.files.content):
            with pytest.raises(openai.NotFoundError, match="no file"):
                await forbidden(batch.input_file_id)
        with pytest.raises(openai.NotFoundError, match="no file"):
            await two.batches.create(input_file_id=batch.input_file_id, endpoint=ENDPOINT, completion_window="24h")
        assert [each.id async for each in two.batches.list()] == []
        with pytest.raises(openai.AuthenticationError):
            await world.client("nobody").batches.list()
        assert (await ended(one, batch)).status == "completed"
        refused = await ended(two, await create(two, text(line(1, body=BODY | {"model": "a"}))))
        (row,) = await rows(two, refused.error_file_id)
    assert row["response"]["status_code"] == 403


async def test_a_tenant_at_its_limits_delays_neither_its_other_requests_nor_the_batches_of_others(
    tmp_path: Path,
) -> None:
    tenants = TENANTS | {"one": TENANTS["one"].model_copy(update={"max_requests": 1})}
    world = World(tmp_path, tenants=tenants)
    one, two = world.client("one"), world.client("two")
    world.setup.shards.loads_held.clear()  # lines of the adapter wait
    async with world.running():
        waiting = await create(one, text(*(line(n, body=BODY | {"model": "a"}) for n in range(90))))
        async with asyncio.timeout(30):
            while world.setup.engine.idle:
                await asyncio.sleep(0.05)
        assert (await one.completions.create(**BODY)).choices  # a place that the batch does not take
        assert (await ended(two, await create(two, text(*map(line, range(90)))))).status == "completed"
        assert (await one.batches.retrieve(waiting.id)).request_counts.completed == 0
        world.setup.shards.loads_held.set()
        await one.batches.cancel(waiting.id)
        assert (await ended(one, waiting)).status == "cancelled"


async def test_batches_begin_one_after_the_other_for_each_tenant_and_read_piece_by_piece(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    beginning, most, pauses, begin = Counter[str](), Counter[str](), list[float](), Job.begin

    def watched(job: Job, longest: int) -> bool:
        beginning[job.tenant] += 1
        most[job.tenant] = max(most[job.tenant], beginning[job.tenant])
        try:
            return begin(job, longest)
        finally:
            beginning[job.tenant] -= 1

    monkeypatch.setattr(Job, "begin", watched)
    monkeypatch.setattr(reading, "time", SimpleNamespace(sleep=pauses.append))
    content = text(line(1, url="/"), *({"unknown": "A" * 1000},) * 200)
    world = World(place, most_bytes=1 << 24, tenants=TENANTS)
    clients = [world.client(tenant) for tenant in TENANTS]
    batches = [(client, await create(client, content)) for client in clients * 4]
    async with world.running():
        assert [(await ended(*each)).status for each in batches] == ["failed"] * 8
    assert most == {"one": 1, "two": 1}
    assert len(pauses) >= 8 * (len(content) // PIECE)


async def test_uploads_of_a_tenant_do_not_keep_others_waiting(tmp_path: Path) -> None:
    world = World(tmp_path, tenants=TENANTS)
    async with AsyncExitStack() as uploading:
        for _ in range(MOST_UPLOADS):
            await uploading.enter_async_context(uploads["one"])
        with pytest.raises(openai.RateLimitError, match="being uploaded"):
            await world.client("one").files.create(file=b"x", purpose="batch")
        assert (await world.client("two").files.create(file=b"x", purpose="batch")).id


async def test_however_many_requests_of_a_tenant_wait_for_a_slow_storage_those_of_others_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_router.api.http.openai.batches.routes.ANSWER_SECONDS", 0.5)
    world, goes_on, batches = World(tmp_path, tenants=TENANTS), threading.Event(), BatchFolder.batches

    def slow(self: BatchFolder, tenant: str) -> Any:
        if tenant == "one":
            goes_on.wait(120)
        return batches(self, tenant)

    monkeypatch.setattr(BatchFolder, "batches", slow)
    one, two = world.client("one"), world.client("two")
    try:
        for _ in range(2):  # threads whose requests have been given up are still taken
            flood = [asyncio.ensure_future(one.batches.list(limit=1)) for _ in range(2 * THREADS)]
            await asyncio.sleep(0.1)
            assert not (await two.files.list()).data and not (await two.batches.list()).data
            refused = await asyncio.gather(*flood, return_exceptions=True)
            assert {type(each) for each in refused} <= {openai.InternalServerError, openai.RateLimitError}
        assert all("too many requests for files and batches wait" in str(each) for each in refused)
    finally:
        goes_on.set()
    assert not (await one.batches.list(limit=1)).data


async def test_lists_of_a_folder_read_only_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, read, read_bytes = World(tmp_path).client(), list[str](), Path.read_bytes

    def watched(path: Path) -> bytes:
        read.append(path.stem)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", watched)
    ids = {(await create(client, text(line(n)))).id for n in range(3)}
    assert {each.id async for each in client.batches.list()} == ids and len((await client.files.list()).data) == 3
    read.clear()
    assert (await client.batches.list(limit=1)).has_more and len((await client.files.list()).data) == 3 and not read
    cancelled = await client.batches.cancel(min(ids))
    assert {each.status async for each in client.batches.list()} == {"validating", "cancelling"}
    async with World(tmp_path).running():
        await ended(client, cancelled)
        read.clear()
        assert cancelled.id in {each.id async for each in client.batches.list() if each.status == "cancelled"}
    assert cancelled.id in read


@pytest.mark.parametrize("id", ["file-1", "../../etc/passwd", "file-" + "0" * 24, "..%2f..%2fetc"])
async def test_an_id_that_is_not_one_is_unknown(id: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(openai.NotFoundError):
        await world.client().files.retrieve(id)


async def test_files_have_limits_and_are_deleted_unless_a_batch_needs_them(tmp_path: Path) -> None:
    world = World(tmp_path, most_bytes=1000)
    client = world.client()
    batch = await create(client, text(line(1)))
    with pytest.raises(openai.BadRequestError, match="has not ended"):
        await client.files.delete(batch.input_file_id)
    with pytest.raises(openai.BadRequestError, match="no room"):
        await client.files.create(file=b"x" * 1001, purpose="batch")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        await client.files.create(file=b"x", purpose="fine-tune")
    async with world.running():
        await ended(client, batch)
    assert (await client.files.delete(batch.input_file_id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(batch.input_file_id)
    assert not list(tmp_path.glob(f"*/files/{batch.input_file_id}"))


async def test_the_files_of_a_tenant_leave_room_for_those_of_others(place: str) -> None:
    tenants = {name: TenantSettings(keys=[sha256(name.encode()).hexdigest()]) for name in ("one", "two", "three")}
    world = World(place, most_bytes=1000, tenants=tenants)
    one, two, three = (world.client(name) for name in tenants)

    async def keep(client: AsyncOpenAI, size: int) -> str:
        return (await client.files.create(file=b"x" * size, purpose="batch")).id

    with pytest.raises(openai.BadRequestError, match=r"your files would have more than 4\.66e-07 GiB, delete some"):
        await keep(one, 501)
    first = await keep(one, 400)
    with pytest.raises(openai.BadRequestError, match="delete some"):
        await keep(one, 101)
    await keep(one, 100)
    await keep(two, 250)
    for size in (126, 500):
        with pytest.raises(openai.InternalServerError, match="the files of others leave no room") as refused:
            await keep(three, size)
        assert refused.value.status_code == 503
    await keep(three, 125)
    with pytest.raises(openai.BadRequestError, match="delete some"):
        await keep(three, 1)
    world.batches.delete_expired()  # a bucket's files are counted then
    with pytest.raises(openai.BadRequestError, match="delete some"):
        await keep(three, 1)
    await one.files.delete(first)
    await keep(three, 200)


async def test_without_keys_files_may_take_all_the_room(place: str) -> None:
    world = World(place, most_bytes=1000)
    for size in (600, 400):
        await world.client().files.create(file=b"x" * size, purpose="batch")
    with pytest.raises(openai.BadRequestError, match="no room"):
        await world.client().files.create(file=b"x", purpose="batch")


async def test_files_and_batches_are_limited_in_number_size_and_time(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, package = World(place), "loraplex_router.batches"
    client, routes = world.client(), "loraplex_router.api.http.openai.batches.routes"
    for name, most in {
        f"{package}.batches.MOST_FILES": 2,
        f"{package}.batches.MOST_BATCHES": 1,
        f"{package}.reading.MOST_LINES": 1,
        f"{routes}.MOST_BYTES": 5000,
    }.items():
        monkeypatch.setattr(name, most)
    batch = await create(client, text(line(1), line(2)))
    with pytest.raises(openai.BadRequestError, match="is one too many: 1 are kept for 30 days"):
        await create(client, text(line(1)))
    with pytest.raises(openai.BadRequestError, match="is one too many: 2 are kept"):
        await client.files.create(file=b"x", purpose="batch")
    with pytest.raises(openai.BadRequestError, match="has more than"):
        await client.files.create(file=b"x" * 5001, purpose="batch")
    monkeypatch.setitem(uploads, "", asyncio.Semaphore(0))
    with pytest.raises(openai.RateLimitError, match="being uploaded"):
        await client.files.create(file=b"x", purpose="batch")
    async with world.running():
        batch = await ended(client, batch)
    assert batch.errors and batch.errors.data and batch.errors.data[0].code == "too_many_tasks"
    monkeypatch.setattr(world.batches, "now", lambda: int(time.time()) + 31 * 86400)
    world.batches.delete_expired()
    assert not (await client.files.list()).data and not (await client.batches.list()).data


async def test_files_expire_when_their_owner_says(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world, expiry = World(place), {"anchor": "created_at", "seconds": 7200}
    client: Any = world.client()
    file = await client.files.create(file=text(line(1)), purpose="batch", expires_after=expiry)
    kept = await client.files.create(file=text(line(1)), purpose="batch")
    assert file.expires_at - file.created_at == 7200 and kept.expires_at - kept.created_at == 30 * 86400
    order = {"input_file_id": file.id, "endpoint": ENDPOINT, "completion_window": "24h"}
    batch = await client.batches.create(**order, output_expires_after=expiry | {"seconds": 3600})
    now = world.batches.now()
    monkeypatch.setattr(world.batches, "now", lambda: now + 8000)
    world.batches.delete_expired()  # the batch needs its input
    async with world.running():
        output_id = (await ended(client, batch)).output_file_id
    output = await client.files.retrieve(output_id)
    assert output.expires_at - output.created_at == 3600
    monkeypatch.setattr(world.batches, "now", lambda: now + 8000 + 3500)
    world.batches.delete_expired()
    assert {each.id for each in (await client.files.list()).data} == {kept.id, output_id}
    monkeypatch.setattr(world.batches, "now", lambda: now + 8000 + 3700)
    world.batches.delete_expired()
    assert [each.id for each in (await client.files.list()).data] == [kept.id]
    assert world.batches._used_bytes().total() == kept.bytes
    with pytest.raises(openai.NotFoundError):
        await client.files.content(output_id)


def test_what_a_router_left_of_a_file_when_it_died_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = BatchFolder(tmp_path, 1 << 20)
    with batches.open_file("one", new_file_id()) as file:
        file.write(b"half")
    batches.open_file("one", new_file_id()).close()  # of answers that never came
    batches.open_file("one", unread := new_file_id()).close()
    (batches._file("one", unread) / "record.json").write_text("{}")  # as another version may write it
    for days, left in ((1, 4), (3, 0)):
        monkeypatch.setattr(batches, "now", lambda days=days: int(time.time()) + days * 86400)
        batches.delete_expired()
        assert batches._used_bytes().total() == left
    assert [path.name for path in tmp_path.glob("*/files/*")] == [unread]


def test_routers_may_create_a_tenants_first_batches_at_the_same_time(tmp_path: Path) -> None:
    routers, together = [BatchFolder(tmp_path, 1 << 20) for _ in range(4)], threading.Barrier(4, timeout=60)

    def create_all(batches: BatchFolder) -> None:
        for number in range(30):
            together.wait()
            id, tenant = new_batch_id(), f"tenant {number}"
            file = {"input_file_id": new_file_id(), "created_at": 1, "expires_at": 2, "endpoint": ENDPOINT}
            batches._create_batch(tenant, BatchRecord(id=id, completion_window="24h", status="validating", **file))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(create_all, routers))
    assert len(routers[0].unfinished()) == 4 * 30


@pytest.mark.parametrize(
    ("expiry", "field"),
    [
        ({"anchor": "created_at", "seconds": 3599}, "seconds"),
        ({"anchor": "created_at", "seconds": 30 * 86400 + 1}, "seconds"),
        ({"anchor": "created_at"}, "seconds"),
        ({"anchor": "last_active_at", "seconds": 3600}, "anchor"),
        ({"seconds": 3600}, "anchor"),
        ({"anchor": "created_at", "seconds": 3600, "minutes": 5}, "minutes"),
    ],
)
async def test_an_expiry_that_is_wrong_is_named(expiry: dict[str, Any], field: str, tmp_path: Path) -> None:
    client: Any = World(tmp_path).client()
    with pytest.raises(openai.BadRequestError) as refused:
        await client.files.create(file=text(line(1)), purpose="batch", expires_after=expiry)
    assert refused.value.param == f"expires_after[{field}]"
    with pytest.raises(openai.BadRequestError) as refused:
        await create(client, text(line(1)), output_expires_after=expiry)
    assert refused.value.param == f"output_expires_after[{field}]"


async def test_lists_have_pages(place: str) -> None:
    client = World(place).client()
    ids = {(await create(client, text(line(n)))).id for n in range(5)}
    page = await client.batches.list(limit=2)
    assert len(page.data) == 2 and page.has_more
    assert {each.id async for each in client.batches.list(limit=2)} == ids
    assert len([each async for each in client.files.list(limit=2)]) == 5
    with pytest.raises(openai.BadRequestError, match="after"):
        await client.batches.list(after="batch_0")


async def test_without_a_folder_the_routes_say_how_to_have_batches() -> None:
    world = World.__new__(World)
    world.setup = Setup()
    with pytest.raises(openai.NotFoundError, match="--batches"):
        await world.client().batches.list()


async def test_a_full_disk_delays_lines_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("loraplex_router.batches.runner.LONGEST_WAIT", 0.1)
    world = World(tmp_path)
    client = world.client()
    batch = await create(client, text(*map(line, range(9))))
    with full_disk(1500):  # room for the batch's record and for some lines
        async with world.running(), asyncio.timeout(30):
            while sum("stopped" in record.message for record in caplog.records) < 3:
                await asyncio.sleep(0.05)
            (written,) = tmp_path.glob(f"*/files/{world.batches.batch('', batch.id).output_file_id}/content")
            kept = written.read_bytes()
    assert kept.count(b"\n") > 1 and kept.endswith(b"\n")
    async with world.running():
        batch = await ended(client, batch)
        found = await rows(client, batch.output_file_id)
    assert sorted(row["custom_id"] for row in found) == [f"line {n}" for n in range(9)]


async def test_what_a_full_disk_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    world = World(tmp_path)
    client = world.client()
    with full_disk(10), pytest.raises(openai.InternalServerError, match="cannot be written") as refused:
        await create(client, text(line(0)))
    assert refused.value.status_code == 503 and not list(tmp_path.glob("*/files/*"))
    file = await client.files.create(file=("in.jsonl", io.BytesIO(text(line(0)))), purpose="batch")
    with full_disk(10), pytest.raises(openai.InternalServerError, match="cannot be written"):
        await client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
    assert not list(tmp_path.glob("*/batches/*"))
    async with world.running():
        batch = await client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
        assert (await ended(client, batch)).status == "completed"


def test_a_folder_that_cannot_be_made_is_named_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^--batches: .*/file/batches cannot be made: Not a directory$"):
        BatchFolder(tmp_path / "file" / "batches", 1)


async def test_a_disk_that_hangs_stops_neither_the_event_loop_nor_the_end_of_the_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_router.batches.runner.SAVE_SECONDS", 0.1)
    hangs, goes_on = threading.Event(), threading.Event()

    def append(self: FolderJob, row: bytes, failed: bool) -> None:
        hangs.set()
        goes_on.wait(120)

    monkeypatch.setattr(FolderJob, "_append", append)
    world = World(tmp_path)
    await create(world.client(), text(line(0)))
    try:
        async with asyncio.timeout(60):
            async with world.running():
                while not hangs.is_set():
                    await asyncio.sleep(0.01)
        assert not goes_on.is_set()
    finally:
        goes_on.set()
        world.batches._working.shutdown()


async def test_a_folder_that_fails_does_not_end_the_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex_router.batches.runner.LONGEST_WAIT", 0.01)
    world = World(tmp_path)
    client, fails, unfinished = world.client(), asyncio.Event(), world.batches.unfinished

    def failing() -> list[Any]:
        if not fails.is_set():
            fails.set()
            raise OSError(5, "Input/output error")
        return unfinished()

    monkeypatch.setattr(world.batches, "unfinished", failing)
    async with world.running():
        assert (await ended(client, await create(client, text(line(0))))).status == "completed"
    assert fails.is_set()
