"""Routers, each with its own replicas of two ranks, as on a cluster: what is killed comes back at the same address."""

import asyncio
import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from tests.chaos.proxy import Proxy
from tests.e2e.processes import Process, Router, free_port
from tests.e2e.tiny import save_adapter, save_model
from tests.stand_in_hub import StandInHub

RANKS = 2
LOCAL = ("red", "green", "blue")
READY_SECONDS = 120
FLAGS = "--move-seconds=120", "--drain-seconds=120", "--max-adapters-on-device=6", "--metrics-adapters=10"


class Ranks(Process):
    """All ranks of all replicas."""

    module = "tests.chaos.ranks"

    def pids(self) -> list[int]:
        """The processes of the ranks, now."""
        found = re.findall(r"^rank (\d+) is process (\d+)$", self.log, re.MULTILINE)
        return [pid for _, pid in sorted({int(number): int(pid) for number, pid in found}.items())]


class Place:
    """Where a router runs; it has the same ports again when it is restarted."""

    def __init__(self, replicas: list[int]) -> None:
        self.replicas = replicas
        self.http_port, self.grpc_port = free_port(), free_port()
        self.deaths = 0  # a request during which this changes may have been broken
        self.outcomes: Counter[str] = Counter()  # of requests that ended since it was started
        self._router: Router | None = None

    @property
    def router(self) -> Router:
        assert self._router
        return self._router

    def finished(self) -> float:
        """How many requests the router says to have finished."""
        return self.router.metric('loraplex_requests_total{outcome="finished"}')

    def start(self, shards: str) -> None:
        ports = f"--http-port={self.http_port}", f"--grpc-port={self.grpc_port}"
        self.outcomes.clear()
        self._router = Router(f"--shards={shards}", *ports, *FLAGS)


class Cluster:
    """`layout`: the number of replicas of each router. Runs during its `async with` block."""

    def __init__(self, folder: Path, layout: Sequence[int]) -> None:
        self.folder = folder
        numbers = iter(range(sum(layout)))
        self.places = [Place([next(numbers) for _ in range(count)]) for count in layout]
        self.ports = [free_port() for _ in range(sum(layout) * RANKS)]
        self._rendezvous = [free_port() for _ in range(sum(layout))]
        self.proxies: list[Proxy] = []
        self.hub = StandInHub()
        self.source_troubles = 0  # increases when the hub or the disk begins to fail (it is odd then), and ends to

    async def __aenter__(self) -> Self:
        self.hub.__enter__()
        model = save_model(self.folder / "model")
        for seed, name in enumerate(LOCAL):
            save_adapter(model, self.folder / "adapters" / name, 8, seed)
        self.proxies = [await Proxy(port).start() for port in self.ports]
        env = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "hub"), "HF_TOKEN": ""}
        self.ranks = Ranks(json.dumps([self._flags(number) for number in range(len(self.ports))]), env=env)
        await asyncio.gather(*(self.start(place) for place in self.places))
        await self.wait_until_ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        for place in self.places:
            place.router.kill()
        self.ranks.kill()
        for proxy in self.proxies:
            await proxy.close()
        self.hub.__exit__(None, None, None)

    def _flags(self, number: int) -> list[str]:
        replica, rank = divmod(number, RANKS)
        return [
            f"--model={self.folder / 'model'}",
            f"--adapters={self.folder / 'adapters'}",
            f"--listen=127.0.0.1:{self.ports[number]}",
            f"--rendezvous=tcp://127.0.0.1:{self._rendezvous[replica]}",
            *(f"--tp={RANKS}", f"--rank={rank}", "--dtype=float32", "--kv-blocks=512", "--threads=1"),
        ]

    async def start(self, place: Place) -> None:
        shards = ";".join(
            ",".join(f"127.0.0.1:{self.proxies[replica * RANKS + rank].port}" for rank in range(RANKS))
            for replica in place.replicas
        )
        await asyncio.to_thread(place.start, shards)

    async def wait_until_ready(self) -> None:
        for place in self.places:
            await asyncio.to_thread(place.router.wait_until, "loraplex_replicas", len(place.replicas), READY_SECONDS)

    @contextlib.contextmanager
    def source_trouble(self) -> Iterator[None]:
        """A context in which adapters may be out of reach."""
        self.source_troubles += 1
        yield
        self.source_troubles += 1
