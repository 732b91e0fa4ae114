"""One run: peace, what happens beside the load, and peace again."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.accounts import Holdings, growth, holdings
from tests.chaos.batch import Batch
from tests.chaos.cluster import Cluster
from tests.chaos.ledger import Ledger
from tests.chaos.troubles import Troubles

WARM_SECONDS = 5.0

Event = Callable[[Cluster, Troubles], Awaitable[list[str]]]  # returns faults, in words


@dataclass(frozen=True)
class Report:
    kills: int
    troubles: Counter[str]
    outcomes: Counter[str]
    faults: list[str]

    def __str__(self) -> str:
        counts = [f"{count:6} {name}" for name, count in (*self.troubles.most_common(), *self.outcomes.most_common())]
        return "\n".join([f"{self.kills} kills", *counts, f"{len(self.faults)} faults", *self.faults])


async def run(folder: Path, layout: Sequence[int], seed: int, workers: int, event: Event) -> Report:
    """`layout`: the number of replicas of each router; `workers`: the number of requests at a time; `event`: what
    happens meanwhile."""
    dice = random.Random(seed)
    async with Cluster(folder, layout) as cluster:
        ledger, troubles = Ledger(cluster, dice), Troubles(cluster, dice)
        await ledger.learn()
        await ledger.ask_all()
        await _load(ledger, workers, WARM_SECONDS)  # so that what is kept for later, such as connections, is there
        before = await _at_rest(cluster)
        batch = Batch(cluster)
        await batch.begin()
        over = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(workers):
                tasks.create_task(ledger.work(over))
            faults = await event(cluster, troubles)
            over.set()
        await cluster.wait_until_ready()
        faults += await batch.audit()
        await ledger.ask_all()
        faults += growth(before, await _at_rest(cluster))
        await asyncio.to_thread(ledger.audit)
        await ledger.close()
        faults += cluster.wrong_usage()
    return Report(troubles.kills, troubles.counts, ledger.outcomes, ledger.faults + faults)


async def _load(ledger: Ledger, workers: int, seconds: float) -> None:
    """So many requests at a time, and nothing happens meanwhile."""
    over = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(workers):
            tasks.create_task(ledger.work(over))
        await asyncio.sleep(seconds)
        over.set()


async def _at_rest(cluster: Cluster) -> Holdings:
    """What processes hold when there are no requests."""
    for place in cluster.places:
        await asyncio.to_thread(place.router.assert_nothing_is_held)
    return await asyncio.to_thread(holdings, cluster)


def kill(kills: int) -> Event:
    """Troubles at random, until so many processes have been killed."""

    async def event(cluster: Cluster, troubles: Troubles) -> list[str]:
        while troubles.kills < kills:
            name = troubles.draw()
            print(f"{troubles.kills:4} kills; now {name}", flush=True)
            await troubles.strike(name)
        return []

    return event


def strike(*names: str) -> Event:
    """These troubles, in this order."""

    async def event(cluster: Cluster, troubles: Troubles) -> list[str]:
        for name in names:
            await troubles.strike(name)
        return []

    return event


def soak(minutes: float) -> Event:
    """Nothing but the load. After ten minutes, or a third of a shorter run, nothing may grow any more."""
    warm = min(10, minutes / 3) * 60

    async def event(cluster: Cluster, troubles: Troubles) -> list[str]:
        await asyncio.sleep(warm)
        before = await asyncio.to_thread(holdings, cluster)
        await asyncio.sleep(minutes * 60 - warm)
        after = await asyncio.to_thread(holdings, cluster)
        for process, held in after.items():
            print(process, *(f"{before[process][name]:.0f} -> {held[name]:.0f} {name}" for name in held), sep=", ")
        return growth(before, after)

    return event
