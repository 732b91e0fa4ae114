"""The lock of the processes that render templates: who holds it for long delays others by one turn, not by many."""

import asyncio
from collections.abc import Callable

import pytest

from loraplex_router.text import fair_lock
from loraplex_router.text.fair_lock import FairLock


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[tuple[str, str, float]]], list[tuple[str, str]]]:
    """The order in which callers that come together get the lock: a tenant, a matter, and the seconds of a turn."""
    now = [0.0]
    monkeypatch.setattr(fair_lock.time, "monotonic", lambda: now[0])

    def get(callers: list[tuple[str, str, float]]) -> list[tuple[str, str]]:
        got = list[tuple[str, str]]()

        async def hold(lock: FairLock, tenant: str, matter: str, seconds: float) -> None:
            turn = await lock.acquire(tenant, matter)
            now[0] += seconds
            got.append((tenant, matter))
            lock.release(turn)

        async def run() -> None:
            lock = FairLock()
            first = await lock.acquire("first", "first")
            tasks = [asyncio.create_task(hold(lock, *caller)) for caller in callers]
            await asyncio.sleep(0)
            lock.release(first)
            await asyncio.gather(*tasks)
            assert not len(lock._tenants)

        asyncio.run(run())
        return got

    return get


def test_a_quick_matter_waits_for_one_turn_of_a_slow_one(order) -> None:
    got = order([("a", "slow", 5.0)] * 10 + [("a", "quick", 0.01)] * 10)
    assert got == [("a", "slow")] + [("a", "quick")] * 10 + [("a", "slow")] * 9


def test_a_tenant_with_many_slow_matters_has_one_turn_before_another_tenant(order) -> None:
    got = order([("a", f"slow {number}", 5.0) for number in range(10)] + [("b", "quick", 0.01)])
    assert got[1] == ("b", "quick")


def test_equals_take_turns_in_the_order_in_which_they_came(order) -> None:
    assert order([("a", "x", 1.0), ("b", "x", 1.0)] * 3) == [("a", "x"), ("b", "x")] * 3


async def test_a_newcomer_has_saved_up_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, got = [0.0], list[str]()
    monkeypatch.setattr(fair_lock.time, "monotonic", lambda: now[0])
    lock = FairLock()

    async def hold(tenant: str) -> None:
        turn = await lock.acquire(tenant, "x")
        got.append(tenant)
        await asyncio.sleep(0)  # the newcomers come
        now[0] += 1.0
        lock.release(turn)

    first = await lock.acquire("a", "x")
    tasks = [asyncio.create_task(hold("a")) for _ in range(3)]
    await asyncio.sleep(0)
    now[0] = 60.0
    lock.release(first)
    tasks += [asyncio.create_task(hold("b")) for _ in range(3)]
    await asyncio.gather(*tasks)
    assert got == ["a", "b", "a", "b", "a", "b"]


async def test_whoever_leaves_while_waiting_or_when_the_turn_comes_does_not_keep_the_lock() -> None:
    lock = FairLock()
    holder = await lock.acquire("a", "x")
    waiting = [asyncio.create_task(lock.acquire("b", "y")) for _ in range(2)]
    await asyncio.sleep(0)
    assert lock.count_waiting("b", "y") == 2
    waiting[1].cancel()
    lock.release(holder)
    waiting[0].cancel()
    await asyncio.wait(waiting)
    assert all(task.cancelled() for task in waiting)
    lock.release(await asyncio.wait_for(lock.acquire("c", "z"), 1))
    assert not len(lock._tenants)
