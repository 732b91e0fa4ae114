"""One run: odd requests to one server, beside a canary, a stream that must not notice."""

import asyncio
import json
import random
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import monotonic

import grpc.aio

from loraplex import AsyncClient
from tests.e2e.processes import Server
from tests.e2e.tiny import save_adapter, save_model
from tests.fuzz.grpc import GrpcRequest, call, odd_message
from tests.fuzz.http import HttpRequest, odd_request, send
from tests.stand_in_hub import StandInHub

FLAGS = "--max-model-len=600", "--kv-blocks=256", "--threads=1", "--max-adapters-on-device=4"
AT_A_TIME = 8
CANARY = {"prompt": "A canary", "max_new_tokens": 200, "ignore_eos": True, "seed": 1, "temperature": 1.0}


@dataclass
class Report:
    statuses: Counter[str] = field(default_factory=Counter)  # of the answers
    faults: list[str] = field(default_factory=list)
    canaries: int = 0
    gaps: list[float] = field(default_factory=list)  # seconds between two pieces of a canary

    def __str__(self) -> str:
        answers = ", ".join(f"{count} {status}" for status, count in self.statuses.most_common())
        gaps = sorted(self.gaps)
        longest, nearly = (f"{gap * 1000:.0f} ms" for gap in (gaps[-1], gaps[len(gaps) * 999 // 1000]))
        heads = (
            f"{self.statuses.total()} requests: {answers}",
            f"{self.canaries} canaries: gaps up to {longest}, 99.9 % up to {nearly}",
            f"{len(self.faults)} faults",
        )
        return "\n".join([*heads, *self.faults])


async def fuzz(folder: Path, seed: int, requests: int) -> Report:
    """Sends so many requests, half of them over HTTP."""
    model = save_model(folder / "model")
    save_adapter(model, folder / "adapters" / "red", 8, 0)
    (folder / "registry.yaml").write_text("adapters: {}\n")
    flags = f"--adapters={folder / 'adapters'}", f"--adapter-registry={folder / 'registry.yaml'}", *FLAGS
    report = Report()
    with StandInHub() as hub, Server(str(model), *flags, env={"HF_ENDPOINT": hub.url, "HF_TOKEN": ""}) as server:
        over, numbers = asyncio.Event(), iter(range(requests))
        names = await asyncio.to_thread(field_names, server.url)
        async with AsyncClient(server.address) as client:
            undisturbed = (await client.generate(**CANARY)).text
            watching = asyncio.create_task(watch(client, undisturbed, over, report))
            await asyncio.gather(*(attack(server, names, seed, numbers, report) for _ in range(AT_A_TIME)))
            over.set()
            await watching
        await asyncio.to_thread(server.assert_nothing_is_held)
    report.faults += [line for line in server.log.splitlines() if line.startswith("Traceback")]
    return report


async def watch(client: AsyncClient, undisturbed: str, over: asyncio.Event, report: Report) -> None:
    """One canary after the other."""
    while not over.is_set():
        text, times = "", list[float]()
        async for piece in client.stream(**CANARY):
            times.append(monotonic())
            text += piece.text
        report.gaps += [later - earlier for earlier, later in pairwise(times)]
        report.canaries += 1
        if text != undisturbed:
            report.faults.append(f"the canary said {text!r}, not {undisturbed!r}")


async def attack(server: Server, names: Sequence[str], seed: int, numbers: Iterator[int], report: Report) -> None:
    """One odd request after the other; its number and the seed make each."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        for number in numbers:
            dice = random.Random(f"{seed} {number}")
            sent = odd_message(dice) if number % 2 else odd_request(names, dice)
            match sent:
                case GrpcRequest():
                    status, wrong = await call(channel, sent)
                case HttpRequest():
                    status, wrong = await send(int(server.url.rpartition(":")[2]), sent)
            report.statuses[status] += 1
            if wrong:
                report.faults.append(f"number {number}: {sent}\n  {wrong[:1500]}")


def field_names(url: str) -> list[str]:
    """The names of all fields in the server's document."""
    with urllib.request.urlopen(f"{url}/openapi.json") as response:
        document = json.load(response)
    models = document["components"]["schemas"].values()
    return sorted({name for model in models for name in model.get("properties", ())})
