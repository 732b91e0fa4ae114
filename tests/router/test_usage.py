"""Usage: each token counts once, whichever routers computed a stream, and each request has its event."""

import asyncio
import json
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos.errors import UnavailableError
from loraplex_router.journal.journal import Journal
from loraplex_router.journal.redis_store import RedisStore
from loraplex_router.store.redis_server import PREFIX, RedisServer
from loraplex_router.usage import ledger as ledgers
from loraplex_router.usage import log as usage_log
from loraplex_router.usage import redis_ledger
from loraplex_router.usage.event import Counted, Used
from loraplex_router.usage.ledger import Entry, Ledger, MemoryLedger, today
from loraplex_router.usage.log import UsageLog
from loraplex_router.usage.redis_ledger import RedisLedger
from tests.full_disk import full_disk
from tests.redis_server import redis_server
from tests.router.test_engine import Setup
from tests.router.test_http_streams import MANY, STREAMS, Client, until
from tests.router.test_resume import ask, events
from tests.tools import needs_redis

STREAM = "/v1/completions", {**STREAMS["/v1/completions"], "max_tokens": MANY}
WHOLE = STREAM[0], {**STREAM[1], "stream": False}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that run tests may be slow."""
    monkeypatch.setattr("loraplex_router.store.redis_server.TIMEOUT", 60.0)


@pytest.fixture(params=["memory", pytest.param("redis", marks=needs_redis)])
async def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Ledger]:
    if request.param == "memory":
        yield MemoryLedger()
        return
    with redis_server(tmp_path) as (url, _):
        server = RedisServer(url)
        yield RedisLedger(server)
        await server.aclose()


def entry(number: int, generated: int, account: str = "one", adapter: str = "a") -> Entry:
    return Entry(number, account, "acme", adapter, Used(1, 10, 4, generated), stream=account)


async def settle(ledger: Ledger, *entries: Entry) -> list[Used]:
    return [counted.used for counted in await ledger.settle(entries)]


async def test_of_a_stream_only_what_is_new_is_counted(ledger: Ledger):
    assert await settle(ledger, entry(0, 5)) == [Used(1, 10, 4, 5)]
    assert await settle(ledger, entry(1, 12), entry(2, 7, "two")) == [Used(generated_tokens=7), Used(1, 10, 4, 7)]
    assert await settle(ledger, entry(3, 11)) == [Used()]  # others had generated more
    never_ran = Entry(4, "three", "acme", "a", None)
    assert await settle(ledger, never_ran) == [Used()]
    assert await ledger.totals([today()]) == {("acme", "a"): Used(2, 20, 8, 19)}
    assert await ledger.totals([today() - timedelta(1)]) == await ledger.totals([]) == {}
    assert await ledger.since() > 0


async def test_an_adapter_too_many_shares_an_entry(ledger: Ledger, monkeypatch: pytest.MonkeyPatch):
    for module in (ledgers, redis_ledger):
        monkeypatch.setattr(module, "MOST_ADAPTERS", 2)
    await ledger.settle([entry(number, 1, str(number), adapter) for number, adapter in enumerate("abcad")])
    found = {adapter: used.requests for (_, adapter), used in (await ledger.totals([today()])).items()}
    assert found == {"a": 2, "b": 1, "[other]": 2}


@given(st.lists(st.integers(0, 100), min_size=1))
def test_a_stream_counts_as_much_as_the_router_that_had_most_of_it(lengths: list[int]) -> None:
    async def count() -> list[Used]:
        ledger = MemoryLedger()
        return [(await settle(ledger, entry(number, length)))[0] for number, length in enumerate(lengths)]

    counted = asyncio.run(count())
    assert sum(used.generated_tokens for used in counted) == max(lengths)
    assert sum(used.requests for used in counted) == 1


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[list[RedisServer]]:
    """A Redis server as three routers have it."""
    with redis_server(tmp_path) as (url, _):
        servers = [RedisServer(url) for _ in range(3)]
        yield servers
        for server in servers:
            await server.aclose()


@needs_redis
async def test_entries_whose_answer_was_lost_are_not_counted_twice(servers: list[RedisServer]):
    ledger, entries = RedisLedger(servers[0]), [entry(0, 5), entry(1, 8)]  # of one stream
    first = await ledger.settle(entries)
    assert [counted.used for counted in first] == [Used(1, 10, 4, 5), Used(generated_tokens=3)]
    assert await ledger.settle(entries) == first
    assert await ledger.totals([today()]) == {("acme", "a"): Used(1, 10, 4, 8)}


@needs_redis
async def test_what_an_earlier_version_has_counted_is_not_counted_again(servers: list[RedisServer]):
    former = "redis.call('SET', KEYS[1], cmsgpack.pack({entry = 'x.0', generated = 5, new = {1, 10, 4, 5}}))"
    await servers[0].run([("EVAL", former, 1, f"{PREFIX}account:one")])
    assert await settle(RedisLedger(servers[0]), entry(0, 8)) == [Used(generated_tokens=3)]


@needs_redis
async def test_an_event_that_a_router_has_counted_but_not_told_is_told_by_another(servers: list[RedisServer]):
    first, second, third = map(RedisLedger, servers)
    (untold,) = await first.settle([entry(0, 5)])
    lost = replace(entry(0, 4), router=servers[0].router)  # what the journal has may be older
    assert await second.settle([lost]) == [untold]
    assert await third.settle([lost]) == [untold]  # the second one has died, too
    await third.told([lost])
    assert await settle(second, replace(lost, number=1)) == [Used()]
    assert await second.totals([today()]) == {("acme", "a"): Used(1, 10, 4, 5)}


class FailingLedger(MemoryLedger):
    fails = True

    async def settle(self, entries: Sequence[Entry]) -> list[Counted]:
        if self.fails:
            raise UnavailableError("no answer")
        return await super().settle(entries)


async def test_while_the_ledger_fails_usage_is_kept_within_a_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("loraplex_router.usage.usage.MOST_UNSETTLED", 3)
    setup, told = Setup(), list[dict[str, object]]()
    usage, engine = setup.telemetry.usage, asyncio.create_task(setup.engine.run())
    usage.ledger = ledger = FailingLedger()
    usage.sinks.append(told.append)
    for number in range(5):
        await setup.answer(1, tokens=number + 1)
    assert (await ask(setup, "/usage", None)).status == 503
    assert [event["generated_tokens"] for event in told] == [1, 2]
    assert "the usage of 2 requests is not in the store" in caplog.text
    ledger.fails = False
    (used,) = json.loads("".join((await ask(setup, "/usage", None)).bodies))["usage"]
    assert used["generated_tokens"] == 3 + 4 + 5
    assert [event["generated_tokens"] for event in told] == [1, 2, 3, 4, 5]
    engine.cancel()


class Router:
    """A service with a journal and a ledger in Redis, and the events that it tells."""

    def __init__(self, url: str) -> None:
        self.server = RedisServer(url)
        self.journal = Journal(RedisStore(self.server, 60), seconds=60)
        self.setup = Setup(journal=self.journal)
        self.usage = self.setup.telemetry.usage
        self.usage.ledger, self.usage.write_streams = RedisLedger(self.server), self.journal.flush
        self.told: list[dict[str, object]] = []
        self.usage.sinks.append(self.told.append)
        runs = (self.setup.engine.run(), self.journal.run(), self.usage.run())
        self._tasks = [asyncio.create_task(run) for run in runs]

    async def die(self) -> None:
        self.usage.ledger = MemoryLedger()  # what it knows is lost
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.server.run([("ZADD", redis_ledger.ROUTERS, 0, self.server.router)])  # as if its lease were over
        await self.server.aclose()

    async def left(self, other: "Router") -> list[object]:
        """What the other one, which has died, has left."""
        return await self.usage.ledger._left_by(other.server.router)


@needs_redis
async def test_what_a_dead_router_has_streamed_is_counted_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loraplex_router.usage.usage.LIVE_SECONDS", 0.1)
    with redis_server(tmp_path) as (url, _):
        first, second = Router(url), Router(url)
        await ask(first.setup, *STREAM, x_request_id="whole")
        await first.usage.settle()
        clients = {name: Client(first.setup, *STREAM, x_request_id=name) for name in ("resumed", "left")}
        running = [asyncio.create_task(client.run()) for client in clients.values()]
        await until(lambda: all(len(events(client)) > 5 for client in clients.values()))
        await first.die()
        received = len(events(clients["left"]))
        await ask(second.setup, *STREAM, events(clients["resumed"])[-1][0])
        outcomes = [("left", "lost"), ("resumed", "finished")]
        await until(lambda: set(outcomes) <= {(each["request_id"], each["outcome"]) for each in second.told})
        tokens = Counter[object]()
        for event in first.told + second.told:
            tokens[event["request_id"]] += event["generated_tokens"]
        assert tokens["whole"] == tokens["resumed"] == MANY and received <= tokens["left"] < MANY
        (used,) = json.loads("".join((await ask(second.setup, "/usage", None)).bodies))["usage"]
        assert (used["requests"], used["prompt_tokens"], used["generated_tokens"]) == (3, 3, tokens.total())
        async with asyncio.timeout(60):
            while await second.left(first):
                await asyncio.sleep(0.01)
        for task in running:
            task.cancel()
        await second.die()


@needs_redis
async def test_what_a_dead_router_was_computing_without_a_stream_is_counted_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("loraplex_router.usage.usage.LIVE_SECONDS", 0.1)
    with redis_server(tmp_path) as (url, _):
        first, second = Router(url), Router(url)
        await ask(first.setup, *WHOLE, x_request_id="ended")
        await first.usage.settle()
        reading = asyncio.create_task(ask(first.setup, *WHOLE, x_request_id="left"))
        await until(lambda: any(each.num_generated > 5 for each in first.usage._running))
        first.setup.shards.step_seconds = 600
        await first.usage._find_lost()
        await first.die()
        await until(lambda: second.told)
        (event,) = second.told
        assert (event["request_id"], event["outcome"], event["prompt_tokens"]) == ("left", "lost", 1)
        assert 0 < event["generated_tokens"] < MANY and event["finish"] == []
        (used,) = json.loads("".join((await ask(second.setup, "/usage", None)).bodies))["usage"]
        assert (used["requests"], used["generated_tokens"]) == (2, MANY + event["generated_tokens"])
        async with asyncio.timeout(60):
            while await second.left(first):
                await asyncio.sleep(0.01)
        reading.cancel()
        await second.die()


@needs_redis
async def test_what_ended_after_its_router_said_that_it_runs_is_counted_and_told_once(servers: list[RedisServer]):
    first, second = map(RedisLedger, servers[:2])
    told, untold = (Entry(number, f"{number}", "acme", "a", Used(1, 10, 4, 7)) for number in range(2))
    await first.lost(lambda: {entry.account: b"[]" for entry in (told, untold)})
    _, left = await first.settle([told, untold])
    await first.told([told])
    lost = [replace(entry, router=servers[0].router, used=Used(1, 10, 4, 5)) for entry in (told, untold)]
    nothing, found = await second.settle(lost)
    assert (nothing.used, found) == (Used(), left)
    assert await second.totals([today()]) == {("acme", "a"): Used(2, 20, 8, 14)}


async def test_usage_events_are_lines_of_a_file_that_may_be_moved_away(tmp_path: Path):
    path = tmp_path / "usage.jsonl"
    log = UsageLog(path)
    log({"n": 1})
    await log.written()
    path.rename(tmp_path / "old")
    log({"n": 2})
    await log.written()
    path.unlink()
    log({"n": 3})
    log({"n": 4})
    log.close()
    assert (tmp_path / "old").read_bytes() == b'{"n":1}\n'
    assert path.read_bytes() == b'{"n":3}\n{"n":4}\n'
    with pytest.raises(OSError, match=r"--usage-log: .* cannot be written to: Is a directory"):
        UsageLog(tmp_path)


async def test_events_that_find_the_disk_full_are_written_as_soon_as_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(usage_log, "AGAIN_SECONDS", 0.01)
    path = tmp_path / "usage.jsonl"
    log, other = UsageLog(path), UsageLog(path)
    with full_disk(20):  # room for two lines and a half
        for number in range(4):
            log({"n": number})
        await log.written()
        await until(lambda: path.read_bytes() == b'{"n":0}\n{"n":1}\n')
    assert [record.message.partition(" for now")[0] for record in caplog.records] == ["usage events are kept"]
    other({"n": 4})
    await until(lambda: path.read_bytes().count(b"\n") == 5)
    assert sorted(json.loads(line)["n"] for line in path.read_text().splitlines()) == [0, 1, 2, 3, 4]
    log.close()
    with full_disk():
        other({"n": 5})
        other.close()
    assert caplog.records[-1].message.startswith("1 usage events are lost")


async def test_a_log_that_is_moved_while_the_disk_is_full_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file that was open is not closed before there is another: its number would be another file's soon."""
    monkeypatch.setattr(usage_log, "AGAIN_SECONDS", 0.01)
    path = tmp_path / "logs" / "usage.jsonl"
    path.parent.mkdir()
    log = UsageLog(path)
    path.parent.rename(tmp_path / "old")
    log({"n": 0})
    await log.written()
    with (tmp_path / "another").open("wb"):
        log({"n": 1})
        await log.written()
    path.parent.mkdir()
    await until(lambda: path.exists() and path.read_bytes() == b'{"n":0}\n{"n":1}\n')
    assert (tmp_path / "another").read_bytes() == b""
    log.close()


async def test_a_disk_that_does_not_answer_stops_nothing_and_other_routers_know_what_is_not_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    answers, steps, write = threading.Event(), list[str](), os.write

    def hang(file: int, data: bytes) -> int:
        if file == log._file:
            answers.wait(60)
            steps.append("written")
        return write(file, data)

    class ToldLedger(MemoryLedger):
        async def told(self, entries: Sequence[Entry]) -> None:
            steps.append("told")

    monkeypatch.setattr(os, "write", hang)
    monkeypatch.setattr(usage_log, "WRITE_SECONDS", 60)
    setup, log = Setup(), UsageLog(tmp_path / "usage.jsonl")
    usage, engine = setup.telemetry.usage, asyncio.create_task(setup.engine.run())
    usage.ledger, usage.written = ToldLedger(), log.written
    usage.sinks.append(log)
    await setup.answer(1, tokens=2)
    settling = asyncio.create_task(usage.settle())
    await asyncio.sleep(0.05)
    assert not steps
    answers.set()
    await settling
    assert steps == ["written", "told"]
    answers.clear()
    monkeypatch.setattr(usage_log, "WRITE_SECONDS", 0.01)
    for _ in range(2):
        await setup.answer(1, tokens=2)
        await usage.settle()
    assert steps == ["written", "told", "told", "told"] and "the disk does not answer" in caplog.text
    answers.set()
    await until(lambda: (tmp_path / "usage.jsonl").read_bytes().count(b"\n") == 3)
    log.close()
    engine.cancel()


async def test_a_ledger_that_fails_is_asked_again_at_the_next_sign_of_life_whatever_ends(
    monkeypatch: pytest.MonkeyPatch,
):
    setup, asked = Setup(), 0

    class CountingLedger(FailingLedger):
        async def settle(self, entries: Sequence[Entry]) -> list[Counted]:
            nonlocal asked
            asked += 1
            return await super().settle(entries)

    usage, engine = setup.telemetry.usage, asyncio.create_task(setup.engine.run())
    usage.ledger = ledger = CountingLedger()
    monkeypatch.setattr("loraplex_router.usage.usage.LIVE_SECONDS", 600)
    running = asyncio.create_task(usage.run())
    for _ in range(10):
        await setup.answer(1, tokens=2)
        await asyncio.sleep(0.01)
    assert asked == 1
    ledger.fails = False
    running.cancel()
    await asyncio.wait([running])
    assert asked == 2 and not usage._unsettled
    engine.cancel()


async def test_usage_of_some_days_can_be_asked_for():
    setup = Setup()
    task = asyncio.create_task(setup.engine.run())
    await setup.answer(1, tokens=3)
    day = date.isoformat(today())
    for query, found in (("", 1), (f"?from={day}&to={day}", 1), (f"?to={today() - timedelta(1)}", 0)):
        answer = json.loads("".join((await ask(setup, f"/usage{query}", None)).bodies))
        assert len(answer["usage"]) == found, query
    assert (await ask(setup, "/usage?from=yesterday", None)).status == 422
    task.cancel()
