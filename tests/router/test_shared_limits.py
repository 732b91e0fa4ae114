"""Limits over several routers that share a Redis server: what all of them begin together never exceeds a limit."""

import asyncio
import logging
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from loraplex_protos.errors import ForbiddenError, RateLimitedError, UnavailableError
from loraplex_router.access import shared_limits
from loraplex_router.access.limit_store import LEASE_SECONDS, LimitStore, Verdict
from loraplex_router.access.shared_limits import SharedLimits
from loraplex_router.access.tenant import Allowance, Tenant, Visit
from loraplex_router.store import redis_server as redis_servers
from loraplex_router.store.redis_server import RedisServer
from tests.redis_server import redis_server
from tests.tools import needs_redis

pytestmark = needs_redis

ALLOWANCE = Allowance(max_requests=3, max_adapters=2, requests_per_minute=6)
Redis = tuple[str, "subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


class Router:
    """One that has a tenant, begins visits of it, and says so whenever `exchange` is called."""

    def __init__(self, url: str, allowance: Allowance, tenant: str, clock: list[float]) -> None:
        self.tenant = Tenant(tenant, allowance)
        self.server = RedisServer(url)
        self.limits = SharedLimits(LimitStore(self.server, lambda: clock[0]), lambda: clock[0])
        self.visits: list[Visit] = []
        self.clock = clock

    async def begin(self, *adapters: str, background: bool = False) -> str:
        """What is refused, in words; empty if nothing is."""
        beginning = asyncio.create_task(self.limits.begin(self.tenant, self.clock[0], adapters, background))
        await asyncio.sleep(0)
        await self.limits.exchange()
        try:
            self.visits.append(await beginning)
        except (RateLimitedError, ForbiddenError) as refusal:
            return refusal.message
        return ""


ADAPTERS = st.sets(st.sampled_from("abc"), max_size=2)
BEGIN = st.tuples(st.just("begin"), st.integers(0, 2), st.tuples(ADAPTERS, st.booleans()))
STEPS = st.lists(
    st.one_of(
        *[BEGIN] * 4,
        st.tuples(st.just("end"), st.integers(0, 2), st.integers(0, 5)),
        *[st.tuples(st.just("wait"), st.just(0), st.integers(1, 4))] * 3,
        st.tuples(st.just("kill"), st.integers(0, 2), st.none()),
    ),
    min_size=20,
    max_size=60,
)
TENANTS = iter(range(10**6))


@settings(max_examples=40, deadline=None, phases=[Phase.generate])
@given(steps=STEPS)
def test_what_all_routers_begin_never_exceeds_a_limit(redis: Redis, steps: list[tuple[str, int, object]]):
    asyncio.run(follow(redis[0], steps))


async def follow(url: str, steps: list[tuple[str, int, object]]) -> None:
    clock, name, begun = [1000.0], f"tenant {next(TENANTS)}", 0
    routers = [Router(url, ALLOWANCE, name, clock) for _ in range(3)]
    lost: list[tuple[float, list[Visit]]] = []  # what dead routers had, until it is forgotten
    for what, number, detail in steps:
        router = routers[number]
        if what == "begin":
            adapters, background = detail
            held = [visit for each in routers for visit in each.visits]
            leased = held + [visit for until, visits in lost if until > clock[0] for visit in visits]
            leased = [visit for visit in leased if visit.background is background]  # which have limits of their own
            names = set().union(*(visit.adapters for visit in leased))
            refusal = await router.begin(*adapters, background=background)
            if "requests at once" in refusal:
                assert len(leased) == 3
            elif "adapters at once" in refusal:
                assert len(names | adapters) > 2
            elif refusal:
                assert "6 requests a minute" in refusal and begun > 5
            else:
                begun += 1
                assert len(leased) < 3 and len(names | adapters) <= max(2, len(names))
                assert begun <= 6 + (clock[0] - 1000.0) * 6 / 60 + 1e-6
        elif what == "end" and router.visits:
            router.visits.pop(detail % len(router.visits)).end_part()
            await router.limits.exchange()
        elif what == "wait":
            clock[0] += detail
            for each in routers:
                await each.limits.exchange()
        elif what == "kill":
            await router.limits.exchange()
            lost.append((clock[0] + LEASE_SECONDS, router.visits))
            await router.server.aclose()
            routers[number] = Router(url, ALLOWANCE, name, clock)
    for each in routers:
        await each.server.aclose()


async def test_an_adapter_that_several_visits_name_counts_once_for_all_routers(redis: Redis):
    clock = [1000.0]
    first, second = (Router(redis[0], Allowance(max_adapters=2), "careful", clock) for _ in range(2))
    assert not await first.begin("a") and not await first.begin("a")
    assert not await second.begin("b")
    assert "adapters at once" in await second.begin("c")
    for each in (first, second):
        await each.server.aclose()


async def test_tokens_that_one_router_spends_are_missing_in_the_other(redis: Redis):
    clock, allowance = [0.0], Allowance(tokens_per_minute=60)
    first, second = (Router(redis[0], allowance, "spender", clock) for _ in range(2))
    assert not await first.begin() and not await second.begin()
    first.visits[0].spend(89, clock[0])
    await first.limits.exchange()
    await first.limits.exchange()  # it is not counted again
    assert "60 tokens a minute: try again in 30.0 s" in await second.begin()
    assert second.tenant.remaining(0.0) == first.tenant.remaining(0.0)
    clock[0] = 30.1
    assert not await second.begin()
    for each in (first, second):
        await each.server.aclose()


@pytest.mark.parametrize("failure", [None, ZeroDivisionError("a fault of ours")])
async def test_calls_do_not_wait_for_an_answer_that_never_comes(failure: Exception | None):
    class Store:
        asked = asyncio.Event()

        async def exchange(self, uses: object) -> list[Verdict]:
            if uses:
                self.asked.set()
                if failure:
                    raise failure
                await asyncio.Event().wait()
            return []

    store = Store()
    limits = SharedLimits(store)
    running = asyncio.create_task(limits.run())
    await asyncio.sleep(0)
    call = asyncio.create_task(limits.begin(Tenant("waits", Allowance(max_requests=1)), 0.0))
    async with asyncio.timeout(60):
        await store.asked.wait()
        running.cancel()  # the router stops, if its loop has not failed
        await call
        await asyncio.wait([running])


async def test_a_store_that_fails_is_not_asked_whenever_a_visit_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_limits, "RENEW_SECONDS", 600)

    class Store:
        asked = 0
        failing = asyncio.Event()

        async def exchange(self, uses: object) -> list[Verdict]:
            self.asked += 1
            await self.failing.wait()
            raise UnavailableError("no answer")

    store, tenant = Store(), Tenant("busy", Allowance(max_requests=10))
    limits = SharedLimits(store)
    running = asyncio.create_task(limits.run())
    calls = [asyncio.create_task(limits.begin(tenant, 0.0))]
    while not store.asked:
        await asyncio.sleep(0)
    calls.append(asyncio.create_task(limits.begin(tenant, 0.0)))  # does not wait for another answer then
    await asyncio.sleep(0)
    store.failing.set()
    async with asyncio.timeout(60):
        for visit in await asyncio.gather(*calls):
            visit.end_part()
            limits.wake()
            await asyncio.sleep(0.01)
    assert store.asked == 1
    running.cancel()


async def test_calls_that_come_together_wait_for_one_answer(redis: Redis):
    router = Router(redis[0], Allowance(max_requests=5), "crowd", [0.0])
    running = asyncio.create_task(router.limits.run())
    calls = [router.limits.begin(router.tenant, 0.0) for _ in range(4)]
    gone = asyncio.create_task(router.limits.begin(router.tenant, 0.0))
    await asyncio.sleep(0)
    gone.cancel()
    visits = await asyncio.gather(*calls)
    await router.limits.begin(router.tenant, 0.0)  # the place of the one that is gone
    with pytest.raises(RateLimitedError):
        await router.limits.begin(router.tenant, 0.0)
    visits[0].end_part()
    await router.limits.begin(router.tenant, 0.0)
    running.cancel()
    await router.server.aclose()


async def hang(process: "subprocess.Popen[bytes]", *routers: Router) -> None:
    """The server runs what it is told now once it goes on, but nobody gets its answers."""
    os.kill(process.pid, signal.SIGSTOP)
    for each in routers:
        await each.limits.exchange()
        assert each.server.fails


async def go_on(process: "subprocess.Popen[bytes]", *routers: Router) -> None:
    os.kill(process.pid, signal.SIGCONT)
    async with asyncio.timeout(30):
        for each in routers:
            await each.limits.exchange()
            while each.server.fails:
                await each.limits.exchange()
        await routers[0].limits.exchange()


async def test_tokens_that_are_spent_while_redis_hangs_are_counted_once_when_it_is_back(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(redis_servers, "TIMEOUT", 0.3)
    (url, process), clock = redis, [0.0]
    first, second = routers = [Router(url, Allowance(tokens_per_minute=6000), "reader", clock) for _ in range(2)]
    for each in routers:
        assert not await each.begin()
        each.visits[0].spend(500, clock[0])
    await hang(process, *routers)
    for _ in range(2):
        first.visits[0].spend(1000, clock[0])
        await hang(process, first)
    second.visits[0].spend(1000, clock[0])
    first.visits.pop().end_part()
    await go_on(process, *routers)
    for _ in range(3):  # also if the server runs earlier calls only now
        for each in routers:
            assert await each.begin() == ""
            (left,) = each.tenant.remaining(clock[0])
            assert left.count == 6000 - 2 * 500 - 3 * 1000
    for each in routers:
        await each.server.aclose()


async def test_tokens_that_are_given_back_are_there_for_all_routers(redis: Redis, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(redis_servers, "TIMEOUT", 0.3)
    (url, process), clock = redis, [0.0]
    first, second = routers = [Router(url, Allowance(tokens_per_minute=6000), "waiting", clock) for _ in range(2)]

    async def left() -> set[int]:
        counts = set()
        for each in routers:
            assert await each.begin() == ""
            counts.update(left.count for left in each.tenant.remaining(clock[0]))
        return counts

    assert await left() == {6000}
    first.visits[0].spend(4000, clock[0])
    assert await left() == {2000}
    first.visits[0].spend(-3000, clock[0])  # the prompt of a request that was cancelled before it ran
    await hang(process, first)
    await go_on(process, first)
    assert await left() == {5000}
    second.visits[0].spend(1000, clock[0])
    first.visits[0].spend(500, clock[0])
    await second.limits.exchange()
    assert await left() == {3500}
    for each in routers:
        await each.server.aclose()


async def test_what_the_rate_makes_good_while_redis_hangs_is_not_missing_when_it_is_back(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(redis_servers, "TIMEOUT", 0.3)
    (url, process), clock = redis, [0.0]
    router = Router(url, Allowance(tokens_per_minute=6000), "steady", clock)
    assert not await router.begin()
    for _ in range(10):
        router.visits[0].spend(6000, clock[0])
        clock[0] += 60
    router.visits[0].spend(1000, clock[0])
    await hang(process, router)
    await go_on(process, router)
    (left,) = router.tenant.remaining(clock[0])
    assert left.count == 5000
    await router.server.aclose()


async def test_while_redis_hangs_each_router_counts_for_itself(redis: Redis, caplog: pytest.LogCaptureFixture):
    url, process = redis
    first, second = (Router(url, Allowance(max_requests=1), "patient", [0.0]) for _ in range(2))
    assert not await first.begin() and await second.begin()
    os.kill(process.pid, signal.SIGSTOP)
    async with asyncio.timeout(30):
        assert not await second.begin()
        assert second.server.fails and "each router counts limits for itself" in caplog.text
        with pytest.raises(RateLimitedError):  # at once
            await second.limits.begin(second.tenant, 0.0)
        os.kill(process.pid, signal.SIGCONT)
        while second.server.fails:
            await second.limits.exchange()
    assert "together again" in caplog.text and caplog.records[-1].levelno == logging.WARNING
    first.visits.pop().end_part()
    await first.limits.exchange()
    assert "1 requests at once" in await first.begin()  # the second one's is counted
    for each in (first, second):
        await each.server.aclose()
