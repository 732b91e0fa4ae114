"""Routers, each with its own replicas of two ranks, as on a cluster: what is killed comes back at the same address."""

import asyncio
import contextlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from tests.chaos.clock import Clock
from tests.chaos.disk import Disk
from tests.chaos.proxy import Proxy
from tests.e2e.processes import Process, Router, free_port
from tests.e2e.tiny import save_adapter, save_model
from tests.redis_server import redis_server
from tests.stand_in_hub import StandInHub
from tests.stand_in_stores import StandInS3

LOG = Path(tempfile.gettempdir(), f"loraplex-chaos-{os.getpid()}.log")  # of all processes, at the end
RANKS = 2
LOCAL = ("red", "green", "blue")
READY_SECONDS = 120
# There is host memory for some hundred adapters, so that the oldest ones have to leave.
ADAPTERS = "--max-adapters-on-device=6", "--adapter-host-gib=0.01", "--metrics-adapters=10"
FLAGS = "--move-seconds=120", "--drain-seconds=120", *ADAPTERS


class Ranks(Process):
    """All ranks of all replicas."""

    module = "tests.chaos.ranks"

    def pids(self) -> list[int]:
        """The processes of the ranks, now."""
        found = re.findall(r"^rank (\d+) is process (\d+)$", self.log, re.MULTILINE)
        return [pid for _, pid in sorted({int(number): int(pid) for number, pid in found}.items())]


class WrongRouter(Router):
    """A router whose wall clock can be wrong."""

    module = "tests.chaos.clock"


class Place:
    """Where a router runs; it has the same ports again when it is restarted."""

    def __init__(self, replicas: list[int]) -> None:
        self.replicas = replicas
        self.http_port, self.grpc_port = free_port(), free_port()
        self.starts = 0
        self.deaths = 0  # a request during which this changes may have been broken
        self.outcomes: Counter[str] = Counter()  # of requests that ended since it was started
        self.log = ""  # of routers that have ended
        self._router: Router | None = None

    @property
    def router(self) -> Router:
        assert self._router
        return self._router

    def finished(self) -> float:
        """How many requests the router says to have finished."""
        return self.router.metric('loraplex_requests_total{outcome="finished"}')

    def kill(self) -> None:
        if self._router:
            self._router.kill()

    def start(self, *flags: str, env: Mapping[str, str]) -> None:
        ports = f"--http-port={self.http_port}", f"--grpc-port={self.grpc_port}"
        if self._router:
            self.log += self._router.log
        self.outcomes.clear()
        self.starts += 1
        self._router = WrongRouter(*flags, *ports, *FLAGS, env=dict(env))


class Cluster:
    """`layout`: the number of replicas of each router. Runs during its `async with` block."""

    def __init__(self, folder: Path, layout: Sequence[int]) -> None:
        self.folder = folder
        numbers = iter(range(sum(layout)))
        self.places = [Place([next(numbers) for _ in range(count)]) for count in layout]
        self.ports = [free_port() for _ in range(sum(layout) * RANKS)]
        self._rendezvous = [free_port() for _ in range(sum(layout))]
        self.proxies: list[Proxy] = []
        self._usage = folder / "usage.jsonl"
        self.hub = StandInHub()
        self.troubles: Counter[str] = Counter()  # counts when one that `trouble` names begins, and when it ends
        self.losses = 0  # how often a rank was ended, stopped or cut off, so that routers may have lost its replica

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self.disk = stack.enter_context(Disk(self.folder))
            stack.enter_context(self.hub)
            self.bucket = stack.enter_context(StandInS3(stack.enter_context(pytest.MonkeyPatch.context())))
            self._store, self.store = stack.enter_context(redis_server(self.folder))
            self.clock = Clock(self.folder / "clock")
            (self.folder / "registry.yaml").write_text("adapters: {}\n")
            model = save_model(self.folder / "model")
            for seed, name in enumerate(LOCAL):
                save_adapter(model, self.folder / "adapters" / name, 8, seed)
            for port in self.ports:
                self.proxies.append(await Proxy(port).start())
                stack.push_async_callback(self.proxies[-1].close)
            env = {
                "HF_ENDPOINT": self.hub.url,
                "HF_HOME": str(self.folder / "hub"),
                "HF_TOKEN": "",
                **self.clock.environment,
            }
            self.ranks = Ranks(json.dumps([self._flags(number) for number in range(len(self.ports))]), env=env)
            stack.callback(self.ranks.kill)
            for place in self.places:
                stack.callback(place.kill)
            await asyncio.gather(*(self.start(place) for place in self.places))
            await self.wait_until_ready()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        LOG.write_text(self._log())
        await self._stack.aclose()

    def _flags(self, number: int) -> list[str]:
        replica, rank = divmod(number, RANKS)
        return [
            f"--model={self.folder / 'model'}",
            f"--adapters={self.folder / 'adapters'}",
            "--adapters-s3=s3://bucket/fresh",
            f"--listen=127.0.0.1:{self.ports[number]}",
            f"--rendezvous=tcp://127.0.0.1:{self._rendezvous[replica]}",
            *(f"--tp={RANKS}", f"--rank={rank}", "--dtype=float32", "--kv-blocks=512", "--threads=1"),
        ]

    async def start(self, place: Place) -> None:
        shards = ";".join(
            ",".join(f"127.0.0.1:{self.proxies[replica * RANKS + rank].port}" for rank in range(RANKS))
            for replica in place.replicas
        )
        registry = f"--adapter-registry={self.folder / 'registry.yaml'}"
        written = f"--usage-log={self._usage}", f"--batches={self.folder / 'batches'}"
        flags = f"--shards={shards}", f"--store={self._store}", registry, *written
        await asyncio.to_thread(partial(place.start, *flags, env=self.clock.environment))

    def _log(self) -> str:
        return "\n".join([self.ranks.log, *(place.log + place.router.log for place in self.places)])

    def wrong_usage(self) -> list[str]:
        """Lines of the usage log that are not events, in words."""
        return [f"usage: {line!r}" for line in self._usage.read_text().splitlines() if not _is_json(line)]

    async def wait_until_ready(self) -> None:
        for place in self.places:
            await asyncio.to_thread(place.router.wait_until, "loraplex_replicas", len(place.replicas), READY_SECONDS)

    @contextlib.contextmanager
    def trouble(self, what: str) -> Iterator[None]:
        """A context in which adapters' "source", a "reader" of one or the "store" of streams fails."""
        self.troubles[what] += 1
        yield
        self.troubles[what] += 1

    def had_trouble(self, what: str, before: Mapping[str, int]) -> bool:
        """Whether it failed at any time since `troubles` was as it was before."""
        return before.get(what, 0) % 2 == 1 or self.troubles[what] != before.get(what, 0)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
