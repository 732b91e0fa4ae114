"""Asks, and keeps account: each request ends exactly once, with the answer that it had in peace, or with a typed error
that the cluster's troubles explain."""

import asyncio
import random
import time
from collections import Counter

from loraplex import (
    AdapterConflictError,
    AdapterNotFoundError,
    AdapterSourceError,
    GenerationError,
    LoraplexError,
    OverloadedError,
    UnavailableError,
)
from tests.chaos.batch import REQUESTS
from tests.chaos.cluster import Cluster, Place
from tests.chaos.load import CASES, Answer, Broken, Clients

LIMIT_SECONDS = 240  # a request that takes longer never ends
DOOR_SECONDS = 0.2  # before a request that was refused for now is sent to another router
LEAVING = 0.05  # the share of clients that do not wait for the end
FINISHED, RESUMED, LEFT, FAULT = "finished", "finished, although its router ended meanwhile", "left", "fault"
REFUSED, DIED = "refused for now", "its router died before a stream had begun"
NO_SOURCE, NO_STORE = "its adapter's source failed", "it could not be resumed, since the store failed"
SUSPECTED, SUSPICIOUS = "several replicas were lost while they worked on it", 3  # as in the router's suspects.py
NO_VERSION, REPLACED = "its router died and its adapter was replaced", (AdapterConflictError, AdapterNotFoundError)


class Ledger:
    """`outcomes`: how many requests ended how; `faults`: what must not happen, in words."""

    def __init__(self, cluster: Cluster, dice: random.Random) -> None:
        self._cluster, self._dice = cluster, dice
        self._clients = {place: Clients(cluster, place) for place in cluster.places}
        self._peaceful: dict[str, Answer] = {}
        self._sizes: dict[str, float] = {}  # as how many requests a router counts each case
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []

    async def learn(self) -> None:
        """Asks everything in peace, one after the other."""
        place = self._cluster.places[0]
        for name, ask in CASES.items():
            before = await asyncio.to_thread(place.finished)
            self._peaceful[name] = await ask(self._clients[place])
            self._sizes[name] = await asyncio.to_thread(place.finished) - before
            place.outcomes[FINISHED] += self._sizes[name]

    async def ask_all(self) -> None:
        """Asks everything at all routers, at the same time."""
        await asyncio.gather(*(self._try(name, place) for place in self._cluster.places for name in CASES))

    async def work(self, over: asyncio.Event) -> None:
        """Asks one request after the other."""
        while not over.is_set():
            await self._ask(self._dice.choice(list(CASES)))

    def audit(self) -> None:
        """Compares with what the routers have counted, when nothing is asked any more. A batch may be among it."""
        for place in self._cluster.places:
            least, most = place.outcomes[FINISHED], place.outcomes.total() + REQUESTS
            if not least <= place.finished() <= most:
                self.faults.append(f"a router finished {place.finished()} requests, not {least} to {most}")

    async def close(self) -> None:
        for clients in self._clients.values():
            await clients.grpc.close()

    async def _ask(self, name: str) -> None:
        """Asks until a router takes the request."""
        leaves = self._dice.random() < LEAVING
        try:
            async with asyncio.timeout(self._dice.uniform(0, 2) if leaves else LIMIT_SECONDS):
                while await self._try(name, self._dice.choice(self._cluster.places)) == REFUSED:
                    await asyncio.sleep(DOOR_SECONDS)
        except TimeoutError:
            if not leaves:
                self.faults.append(f"{name}: no end after {LIMIT_SECONDS} s")

    async def _try(self, name: str, place: Place) -> str:
        """Asks a router, and returns the outcome."""
        outcome = LEFT
        try:
            outcome = await self._outcome(name, place)
        finally:
            self.outcomes[outcome] += 1
            place.outcomes[outcome] += self._sizes[name]
        return outcome

    async def _outcome(self, name: str, place: Place) -> str:
        """Nothing but a store that fails explains a broken stream. Starts and stops of routers explain refusals."""
        starts, deaths, began, losses = place.starts, place.deaths, time.monotonic(), self._cluster.losses
        troubles = self._cluster.troubles.copy()
        try:
            told = self._peaceful[name].difference(await CASES[name](self._clients[place]))
            if not told:
                return FINISHED if place.starts == starts else RESUMED
        except (LoraplexError, Broken, AssertionError) as error:
            if isinstance(error, AdapterSourceError) and self._cluster.had_trouble("source", troubles):
                return NO_SOURCE
            if isinstance(error, Broken) and self._cluster.had_trouble("store", troubles) and place.deaths != deaths:
                return NO_STORE
            if place.deaths != deaths and isinstance(error, Broken) and isinstance(error.__cause__, REPLACED):
                return NO_VERSION
            ended = error.__cause__ if isinstance(error, Broken) else error
            if isinstance(ended, GenerationError) and self._cluster.losses >= losses + SUSPICIOUS:
                return SUSPECTED
            if isinstance(error, UnavailableError):
                return REFUSED if place.deaths == deaths else DIED
            if isinstance(error, OverloadedError) and self._cluster.had_trouble("reader", troubles):
                return REFUSED
            told = f"{type(error).__name__}: {error}"
        self.faults.append(f"{name}, after {time.monotonic() - began:.1f} s: {told}")
        return FAULT
