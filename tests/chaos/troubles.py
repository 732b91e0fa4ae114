"""What happens to a cluster, and is over after a while."""

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable

import psutil

from tests.chaos.cluster import RANKS, Cluster, Place
from tests.stand_in_hub import StandInHub
from tests.stand_in_stores import StandInS3

SECONDS = (0.3, 6.0)  # how long a trouble lasts
SHIFTS = (-86400.0, -4000.0, 4000.0, 86400.0)  # seconds
PAUSE = (0.5, 3.0)  # between two
LOOKS, LOOK_SECONDS = 100, 0.05  # for processes that do not live long
NOTICED_SECONDS = 3.0  # until routers know that the store is back


class Troubles:
    """`counts`: how often each has happened."""

    def __init__(self, cluster: Cluster, dice: random.Random) -> None:
        self._cluster, self._dice = cluster, dice
        self.counts: Counter[str] = Counter()
        self.kills = 0
        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "a rank is killed": (6, self._kill_rank),
            "a replica is killed": (4, self._kill_replica),
            "a stager is killed": (1, self._kill_stager),
            "a reader of an adapter is killed": (3, self._kill_reader),
            "a replica is restarted": (2, self._restart_replica),
            "a rank is stopped": (3, self._stop),
            "a rank is cut off": (2, self._cut_off_rank),
            "a replica is cut off": (2, self._cut_off_replica),
            "the disk is full": (int(cluster.disk.mounted), self._fill_disk),
            "the hub hangs": (1, self._hang_hub),
            "the bucket hangs": (1, self._hang_bucket),
            "the store hangs": (1, self._hang_store),
            "the clock is shifted": (1, self._shift_clock),
            "a router is killed": (2, self._kill_router),
            "a router is restarted": (1, self._restart_router),
            "all pods are rolled": (1, self._roll),
        }

    def draw(self) -> str:
        """The name of a trouble."""
        weights = [weight for weight, _ in self._kinds.values()]
        return self._dice.choices(list(self._kinds), weights)[0]

    async def strike(self, name: str) -> None:
        """One trouble, from its begin to its end, and a pause."""
        self.counts[name] += 1
        await self._kinds[name][1]()
        await asyncio.sleep(self._dice.uniform(*PAUSE))

    async def _wait(self) -> None:
        await asyncio.sleep(self._dice.uniform(*SECONDS))

    def _replica(self) -> range:
        """The numbers of a replica's ranks."""
        replica = self._dice.randrange(len(self._cluster.proxies) // RANKS)
        return range(replica * RANKS, (replica + 1) * RANKS)

    def _send(self, rank: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it is about to be restarted
            os.kill(self._cluster.ranks.pids()[rank], number)
            self.kills += number == signal.SIGKILL
            self._cluster.losses += 1

    async def _kill_rank(self) -> None:
        self._send(self._dice.choice(self._replica()), signal.SIGKILL)

    async def _kill_replica(self) -> None:
        for rank in self._replica():
            self._send(rank, signal.SIGKILL)

    async def _kill_stager(self) -> None:
        rank = self._dice.choice(self._replica())
        with contextlib.suppress(psutil.NoSuchProcess):
            for stager in psutil.Process(self._cluster.ranks.pids()[rank]).children():
                stager.kill()
                self.kills += 1
                self._cluster.losses += 1

    async def _kill_reader(self) -> None:
        """Of the next adapter that is read."""
        with self._cluster.trouble("reader"):
            for _ in range(LOOKS):
                if readers := await asyncio.to_thread(self._readers):
                    with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                        self._dice.choice(readers).kill()
                        self.kills += 1
                        return
                await asyncio.sleep(LOOK_SECONDS)

    def _readers(self) -> list[psutil.Process]:
        """The stagers' children."""
        found = list[psutil.Process]()
        for pid in self._cluster.ranks.pids():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank = psutil.Process(pid)
                stagers = rank.children()
                found += [child for child in rank.children(recursive=True) if child not in stagers]
        return found

    async def _restart_replica(self) -> None:
        self._drain(self._replica())

    def _drain(self, ranks: range) -> None:
        for rank in ranks:
            self._send(rank, signal.SIGTERM)

    async def _stop(self) -> None:
        rank = self._dice.choice(self._replica())
        pid = self._cluster.ranks.pids()[rank]
        self._cluster.losses += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            await self._wait()
            os.kill(pid, signal.SIGCONT)

    async def _cut_off_rank(self) -> None:
        await self._cut_off([self._dice.choice(self._replica())])

    async def _cut_off_replica(self) -> None:
        await self._cut_off(self._replica())

    async def _cut_off(self, ranks: "range | list[int]") -> None:
        self._cluster.losses += 1
        for rank in ranks:
            self._cluster.proxies[rank].joined.clear()
        await self._wait()
        for rank in ranks:
            self._cluster.proxies[rank].joined.set()

    async def _fill_disk(self) -> None:
        """That of all processes."""
        with self._cluster.trouble("source"):
            self._cluster.disk.fill()
            await self._wait()
            self._cluster.disk.free()

    async def _hang_hub(self) -> None:
        await self._hang(self._cluster.hub)

    async def _hang_bucket(self) -> None:
        await self._hang(self._cluster.bucket)

    async def _hang(self, source: StandInHub | StandInS3) -> None:
        source.hang()
        with self._cluster.trouble("source"):
            await self._wait()
        source.release()

    async def _hang_store(self) -> None:
        self._cluster.store.send_signal(signal.SIGSTOP)
        with self._cluster.trouble("store"):
            await self._wait()
            self._cluster.store.send_signal(signal.SIGCONT)
            await asyncio.sleep(NOTICED_SECONDS)

    async def _kill_router(self) -> None:
        place = self._dice.choice(self._cluster.places)
        place.deaths += 1
        self.kills += 1
        await asyncio.to_thread(place.router.kill)
        await self._cluster.start(place)

    async def _restart_router(self) -> None:
        """It finishes what it has."""
        await self._restart(self._dice.choice(self._cluster.places))

    async def _restart(self, place: Place) -> None:
        assert await asyncio.to_thread(place.router.terminate) == 0
        await self._cluster.start(place)

    async def _shift_clock(self) -> None:
        """Of all processes, there and back."""
        self._cluster.clock.set_ahead(self._dice.choice(SHIFTS))
        await self._wait()
        self._cluster.clock.set_ahead(0)

    async def _roll(self) -> None:
        """One pod after the other is restarted, replicas first, each once those before it are ready."""
        for first in range(0, len(self._cluster.proxies), RANKS):
            ranks = range(first, first + RANKS)
            former = self._cluster.ranks.pids()
            self._drain(ranks)
            while any(self._cluster.ranks.pids()[rank] == former[rank] for rank in ranks):
                await asyncio.sleep(0.1)
            await self._cluster.wait_until_ready()
        for place in self._cluster.places:
            await self._restart(place)
            await self._cluster.wait_until_ready()
