"""What one waits for, or is listed, costs as much however many others there are. Lines of Python are counted, not
seconds."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import pytest

from loraplex_protos.errors import OverloadedError
from loraplex_router.access.tenant import Allowance, Tenant
from loraplex_router.adapters.resolutions import Entry, Resolutions
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.fair_slots import FairSlots
from loraplex_router.replicas.listing import Line
from loraplex_router.replicas.replica import GRAMMARS_AT_A_TIME
from loraplex_router.service.scoring import ScoreRequest, score
from loraplex_router.text.fair_lock import FairLock
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.grammar import Grammar, GrammarKind
from loraplex_router.vocabulary.references import AdapterReference
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sequence import Plan
from tests.router.test_engine import Setup
from tests.router.test_scheduler import World


def count_lines(work: Callable[[], object]) -> int:
    """How many lines are executed, each turn of a loop or a comprehension counted as one."""
    count = 0

    def trace(frame: FrameType, event: str, of: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(former)
    return count


def grows_as_its_size(work: Callable[[int], object]) -> bool:
    """Whether ten times as much takes some ten times as many lines, not a hundred times."""
    return count_lines(lambda: work(500)) < 15 * count_lines(lambda: work(50))


async def hold_lock(size: int, tenants: int, matters: int) -> None:
    lock = FairLock()

    async def hold(number: int) -> None:
        turn = await lock.acquire(str(number % tenants), str(number % matters))
        await asyncio.sleep(0)
        lock.release(turn)

    await leave_some([asyncio.create_task(hold(number)) for number in range(size)])


async def take_slots(size: int, tenants: int, matters: int) -> None:
    slots = FairSlots(4)

    async def take(number: int) -> None:
        async with slots.taken(str(number % tenants)):
            await asyncio.sleep(0)

    await leave_some([asyncio.create_task(take(number)) for number in range(size)])


async def leave_some(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.sleep(0)
    for task in tasks[1::3]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(("tenants", "matters"), [(1, 1), (1, 1000), (1000, 1)])
@pytest.mark.parametrize("wait", [hold_lock, take_slots])
def test_many_who_wait_cost_as_much_each_as_few(
    wait: Callable[[int, int, int], Coroutine[None, None, None]], tenants: int, matters: int
) -> None:
    assert grows_as_its_size(lambda size: asyncio.run(wait(size, tenants, matters)))


async def test_what_is_tokenized_waits_in_the_queue_of_sequences_which_has_a_limit() -> None:
    setup = Setup(max_queue=2)  # its engine does not run
    service = setup.service
    kept = [await service.generate(Request(prompt=(1,))) for _ in range(2)]
    for refused in (
        service.tokenize("A", False, None),
        service.tokenizer_for(AdapterReference("a"), None),
        score(service, ScoreRequest(("A",), ("B",), max_query=1)),
    ):
        with pytest.raises(OverloadedError, match="the queue is full"):
            await refused
    for generation in kept:
        service.requests.close(generation)
    assert len(await service.tokenize("A", False, None)) == 1
    assert service.requests.idle


async def test_a_tenants_many_grammars_leave_room_for_another_ones() -> None:
    setup, compiling, go_on = Setup(), list[str](), asyncio.Event()

    async def compile_grammar(grammar: Grammar, adapter: Adapter) -> tuple[str, ...]:
        compiling.append(grammar.text)
        await go_on.wait()
        return ()

    setup.shards.compile_grammar = compile_grammar
    place = setup.replicas.place
    placing = [
        asyncio.create_task(place(None, Grammar(GrammarKind.REGEX, f"{tenant} {number}"), tenant=tenant))
        for tenant, count in (("flood", 50), ("other", 1))
        for number in range(count)
    ]
    for _ in range(10):
        await asyncio.sleep(0)
    assert compiling == [f"flood {number}" for number in range(GRAMMARS_AT_A_TIME // 2)] + ["other 0"]
    go_on.set()
    for lease in await asyncio.gather(*placing):
        lease.close()
    assert len(compiling) == 51


def test_a_sequence_starts_as_fast_beside_many_tenants_and_sequences() -> None:
    def start(size: int) -> int:
        world = World(blocks=2 * size, budget=2 * size, rows=2 * size)
        for number in range(size):
            world.submit("", [number, 1], 2, tenant=str(number // 3))
        plans = list[Plan | None]()
        count = count_lines(lambda: plans.append(world.scheduler.schedule()))
        assert plans[0] and len(plans[0].starts) == size
        return count

    assert start(500) < 15 * start(50)


def test_whether_an_adapter_finds_a_spare_slot_costs_as_much_beside_many_adapters() -> None:
    def look(size: int) -> None:
        pool = AdapterPool(slots=2, host_bytes=1 << 30, device_bytes=size)
        for number in range(size):
            pool.add(str(number), lora_rank=8, size_bytes=1, device_bytes=number)
        for _ in range(size):
            assert pool.has_spare_slot
        for adapter in list(pool):
            pool.remove(adapter)

    assert grows_as_its_size(look)


async def test_many_names_of_one_content_are_listed_as_fast_each_as_few() -> None:
    def list_names(size: int) -> int:
        setup, tenant = Setup(), Tenant("acme", Allowance(adapters=["a[!1]*"]))
        setup.pool.add("content", lora_rank=8, size_bytes=1)
        for number in range(size):
            reference = AdapterReference(f"a{number}")
            setup.resolutions.remember(reference, Entry(reference.id, "local", "", "content"))
        listing, found = setup.administration.listing, list[Line]()
        count = count_lines(lambda: found.extend(listing._loaded(tenant)))
        assert len(found) == size
        return count

    assert list_names(500) < 15 * list_names(50)


async def test_who_does_not_see_all_names_of_a_content_is_not_told_when_it_was_used() -> None:
    setup = Setup()
    adapter = setup.pool.add("content", lora_rank=8, size_bytes=1)
    adapter.last_used = 1.0
    for id in ("a", "b", "c"):
        setup.resolutions.remember(AdapterReference(id), Entry(id, "local", "", "content"))
    for hidden, told in (("", ["a", "b", "c"]), ("a", ["a"]), ("b", ["b"])):
        seen = [name for name in ("a", "b", "c") if name != hidden]
        lines = setup.administration.listing._loaded(Tenant("acme", Allowance(adapters=seen)))
        assert [line.id for line in lines if (status := line.status()) and status.HasField("last_used")] == told


async def test_requests_that_come_while_many_move_cost_as_much_each_as_when_few_do() -> None:
    async def arrive(size: int) -> int:
        setup = Setup(max_queue=10 * size)
        waiting = [await setup.service.generate(Request(prompt=(1,), n=2)) for _ in range(size)]
        setup.replicas.remove(setup.replica)
        replicas = setup.replicas
        assert replicas.num_waiting == replicas.waiting_by_tenant().total() == 2 * size
        count = count_lines(lambda: [replicas.num_waiting for _ in range(size)])
        for generation in waiting:
            setup.service.requests.close(generation)
        assert replicas.num_waiting == 0 == len(replicas.waiting_by_tenant())
        return count

    assert await arrive(500) < 15 * await arrive(50)


def test_what_a_content_is_called_costs_as_much_beside_many_others() -> None:
    def look(size: int) -> None:
        resolutions = Resolutions()
        for number in range(size):
            for id in (f"a{number}", f"b{number}"):
                resolutions.remember(AdapterReference(id), Entry(id, "local", "", str(number)))
        for number in range(size):
            assert resolutions.names(str(number)) == {f"a{number}", f"b{number}"}
            resolutions.forget(str(number), f"a{number}")
            assert [entry.id for entry in resolutions.of(str(number))] == [f"b{number}"]
            resolutions.forget(str(number))
        assert not list(resolutions) and not resolutions.of("0")

    assert grows_as_its_size(look)
