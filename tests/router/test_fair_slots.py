"""Slots for the work of staging: one tenant's work leaves room for others'."""

import asyncio
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from loraplex_router.fair_slots import FairSlots


class Work:
    """Work that holds slots until it is told to end."""

    def __init__(self, total: int) -> None:
        self.slots = FairSlots(total)
        self.running = Counter[str]()
        self.tasks: list[tuple[str, asyncio.Task[None], asyncio.Event]] = []

    async def begin(self, tenant: str, count: int = 1) -> None:
        for _ in range(count):
            end = asyncio.Event()
            self.tasks.append((tenant, asyncio.create_task(self._run(tenant, end)), end))
        await self.settle()

    async def settle(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)

    async def _run(self, tenant: str, end: asyncio.Event) -> None:
        async with self.slots.taken(tenant):
            self.running[tenant] += 1
            try:
                await end.wait()
            finally:
                self.running[tenant] -= 1


async def test_a_tenant_alone_takes_half_and_another_one_always_gets_some() -> None:
    work = Work(48)
    await work.begin("flood", 1000)
    assert work.running["flood"] == 24
    await work.begin("other", 5)
    assert work.running["other"] == 5
    await work.begin("other", 100)
    assert work.running["other"] == 12
    await work.begin("third", 100)
    assert work.running["third"] == 6
    for _, task, _ in work.tasks:
        task.cancel()
    await asyncio.gather(*(task for _, task, _ in work.tasks), return_exceptions=True)
    assert (work.slots._free, work.slots._waiting, work.slots._order, work.slots._taken) == (48, {}, [], Counter())


@given(st.lists(st.tuples(st.sampled_from(["begin", "end", "cancel"]), st.integers(0, 30)), max_size=60))
def test_slots_are_neither_lost_nor_exceeded_and_nobody_waits_where_there_is_one(steps: list[tuple[str, int]]) -> None:
    async def run() -> None:
        work = Work(4)
        for what, number in steps:
            if what == "begin":
                await work.begin("abc"[number % 3])
            elif work.tasks:
                _, task, end = work.tasks.pop(number % len(work.tasks))
                task.cancel() if what == "cancel" else end.set()
                if what == "end" and number % 2:
                    task.cancel()  # also while its turn comes
                await work.settle()
            taken = sum(work.running.values())
            assert taken == 4 - work.slots._free <= 4
            assert all(work.running[tenant] >= work.slots._free for tenant in work.slots._waiting)
        for _, task, end in work.tasks:
            end.set()
            task.cancel()
        await work.settle()
        assert work.slots._free == 4 and not work.slots._waiting

    asyncio.run(run())
