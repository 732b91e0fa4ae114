"""Replicas are lost, requests cancelled, adapters unloaded, merged and replaced, in any order: in the end everyone has
an answer, nothing is held, and router and shards agree about what is where."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_protos.errors import AdapterNotFoundError, LoraplexError
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.engine.scheduler import Limits
from loraplex_router.replicas import replicas
from loraplex_router.replicas.replica import Replica
from loraplex_router.replicas.uploads import Announcement
from loraplex_router.vocabulary.references import AdapterReference, MergedReference
from loraplex_router.vocabulary.request import Request
from tests.router.fake_ranks import ROOM, Ranks
from tests.router.test_engine import Setup

A, B, C, D = (AdapterReference(name) for name in "abcd")
U = AdapterReference("u")
MERGED = [
    MergedReference((A, B)),
    MergedReference((A, B), (1.0, 1.0)),
    MergedReference((C, D)),
    MergedReference((A, U)),
]
CHOICES = [(None,), (A,), (B,), (C,), (D,), (A, C), (U,), (U, B), (D, A), (A, B, C), *((each,) for each in MERGED)]


class Churn(Setup):
    """A service whose replicas come and go."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.joined = 0
        self.engines: dict[Replica, asyncio.Task[None]] = {}
        self.work: list[asyncio.Task[object]] = []
        self.all: list[Replica] = []
        super().__init__(move_seconds=60)
        self.drive(self.replica)

    def add_replica(self, name: str, slots: int = 2, device_bytes: int = 0) -> Replica:
        limits = Limits(max_batch_tokens=8, max_sequences=4, block_size=4)
        shards, pool = Ranks(self.chance), AdapterPool(slots, host_bytes=10 * ROOM)
        observer = self.telemetry.replica(name)
        replica = Replica(name, shards, limits, 12, pool, self.resolutions, observer, self.replicas.changes)
        self.replicas.add(replica)
        self.all.append(replica)
        return replica

    def drive(self, replica: Replica) -> None:
        self.engines[replica] = asyncio.create_task(replica.engine.run())
        self.engines[replica].add_done_callback(lambda task: self._remove(replica, task))

    def _remove(self, replica: Replica, engine: asyncio.Task[None]) -> None:
        if not engine.cancelled() and (error := engine.exception()) and not replica.shards.lost:
            replica.shards.faults.append(repr(error))
        replica.shards.lost = True
        del self.engines[replica]
        self.replicas.remove(replica)

    def begin(self, work: Coroutine[None, None, object]) -> None:
        self.work.append(asyncio.create_task(work))

    # ---- what happens ----------------------------------------------------------------------------------------

    def ask(self) -> None:
        self.begin(self._answer(self.chance.choice(CHOICES)))

    async def _answer(self, adapters: tuple[AdapterReference | MergedReference | None, ...]) -> None:
        named = {"adapter": adapters[0]} if len(adapters) == 1 else {"adapters": adapters}
        tokens = self.chance.randint(1, 12)
        prompt = tuple(range(self.chance.randint(1, 12)))
        request = Request(
            prompt=prompt,
            max_new_tokens=tokens,
            n=self.chance.choice((1, 1, 2)),
            background=self.chance.random() < 0.2,
            **named,
        )
        generations = await self.service.generate_each(request)
        try:
            for generation in generations:
                for delta in await generation.collect():
                    assert len(delta.samples) == tokens
        finally:
            for generation in generations:
                self.service.requests.close(generation)

    def leave(self) -> None:
        """A client, or a caller."""
        if self.work:
            self.chance.choice(self.work).cancel()

    def unload(self) -> None:
        wait = self.chance.random() < 0.7
        self.begin(self.administration.unload(self.chance.choice((A, B, C, D, U)), wait))

    def pin(self) -> None:
        self.begin(self.administration.pin(self.chance.choice((A, B, C, D, U))))

    def unpin(self) -> None:
        with suppress(AdapterNotFoundError):
            self.administration.unpin(self.chance.choice((A, B, C, D, U)))

    def upload(self) -> None:
        self.begin(self._upload())

    async def _upload(self) -> None:
        content = self.chance.choice("abx")
        announced = Announcement(self.chance.choice("bu"), 1)
        async with self.uploads.announced(announced):
            await self.uploads.put(announced, {"adapter_model.safetensors": memoryview(content.encode())})

    def read_again(self) -> None:
        self.begin(self.administration.load(self.chance.choice((A, B, C, D, U))))

    def join(self) -> None:
        self.joined += 1
        self.drive(self.add_replica(f"joined {self.joined}"))

    def lose(self) -> None:
        if self.engines:
            replica = self.chance.choice(list(self.engines))
            replica.shards.lost = True
            self.engines[replica].cancel()

    def hush(self) -> None:
        """A replica falls silent, or answers again."""
        if self.engines:
            replica = self.chance.choice(list(self.engines))
            self.replicas.set_silent(replica.name, not replica.silent)

    def stop(self) -> None:
        if self.engines:
            self.replicas.drain(self.chance.choice(list(self.engines)))

    # ---- in the end ------------------------------------------------------------------------------------------

    async def settle(self) -> None:
        for replica in list(self.engines):
            self.replicas.set_silent(replica.name, False)
        self.join()
        await self.until(lambda: all(task.done() for task in self.work), "somebody waits")
        for task in self.work:
            if not task.cancelled():
                assert isinstance(task.exception(), LoraplexError | None)
        await self.until(lambda: self.replicas.idle, "a generation is left")
        await self.until(lambda: not any(map(self.open_ends, self.all)), "work is left")

    async def until(self, condition: Callable[[], bool], failing: str) -> None:
        for _ in range(10_000):
            if condition():
                return
            await asyncio.sleep(0.001)
        raise AssertionError(f"{failing}: {[self.open_ends(replica) for replica in self.engines]}")

    def open_ends(self, replica: Replica) -> list[str]:
        staging, found = replica.adapters, []
        found += [f"stages {fetching.task}" for fetching in staging.fetching()]
        found += [f"unstages {digest}" for digest in staging._unstaging]
        for adapter in (replica.pool.base, *replica.pool) if replica in self.engines else ():
            if adapter.wanted or adapter.plans or adapter.requests or adapter.leaving:
                found.append(f"uses {adapter}")
        if replica.leases or replica._preparing:
            found.append("has leases")
        return found

    def check(self) -> None:
        for replica in self.all:
            assert not replica.shards.faults
            assert not replica.leases
        for replica in self.engines:
            assert not replica.blocks.used
            assert not replica.scheduler.num_running and not replica.scheduler.num_waiting
            for host, slots in zip(replica.shards.host, replica.shards.slots, strict=True):
                assert sorted(host) == sorted(adapter.digest for adapter in replica.pool)
                assert slots == {adapter.slot: adapter.digest for adapter in replica.pool.on_device()}

    async def close(self) -> None:
        tasks = list(self.engines.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


ACTIONS = [Churn.ask] * 6 + [
    Churn.leave,
    Churn.unload,
    Churn.pin,
    Churn.unpin,
    Churn.upload,
    Churn.read_again,
    Churn.join,
    Churn.lose,
    Churn.hush,
    Churn.stop,
]


async def churn(actions: list[tuple[int, int]], seed: int) -> None:
    cluster = Churn(seed)
    try:
        for action, ticks in actions:
            ACTIONS[action](cluster)
            for _ in range(ticks):
                await asyncio.sleep(0)
        await cluster.settle()
        cluster.check()
    finally:
        await cluster.close()


steps = st.tuples(st.integers(0, len(ACTIONS) - 1), st.sampled_from([0, 0, 1, 2, 5, 20]))


@given(actions=st.lists(steps, max_size=30), seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_everyone_gets_an_answer_and_nothing_is_held(actions: list[tuple[int, int]], seed: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "RETRY_SECONDS", 0.001)
        asyncio.run(churn(actions, seed))
