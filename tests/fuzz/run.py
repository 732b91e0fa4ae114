"""One run: odd requests to one server, beside a canary, a stream that must not notice."""

import asyncio
import json
import random
import sys
import time
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from tests.e2e.processes import Server
from tests.e2e.tiny import save_adapter, save_model
from tests.fuzz.canary import Seen
from tests.fuzz.frames import odd_frames
from tests.fuzz.grpc import call, odd_message
from tests.fuzz.http import Api, odd_request, read_api, send
from tests.stand_in_hub import StandInHub

FLAGS = "--max-model-len=600", "--kv-blocks=256", "--threads=1", "--max-adapters-on-device=4", "--store=memory"
SHOWN = 8  # requests beside a gap
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Sent:
    number: int
    text: str
    began: float  # by time.monotonic, as on all processes of a machine
    ended: float


@dataclass
class Report:
    statuses: Counter[str] = field(default_factory=Counter)  # of the answers
    sent: list[Sent] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)

    def __str__(self) -> str:
        answers = ", ".join(f"{count} {status}" for status, count in self.statuses.most_common())
        gaps = sorted(self.seen.gaps)
        longest, nearly = (f"{gap * 1000:.0f} ms" for gap, _ in (gaps[-1], gaps[len(gaps) * 999 // 1000]))
        heads = (
            f"{self.statuses.total()} requests: {answers}",
            f"{self.seen.canaries} canaries: gaps up to {longest}, 99.9 % up to {nearly}; the machine woke them up to "
            f"{self.seen.late * 1000:.0f} ms late",
            *(f"a gap of {gap * 1000:.0f} ms beside\n{self._beside(gap, when)}" for gap, when in gaps[:-4:-1]),
            f"{len(self.faults)} faults",
        )
        return "\n".join([*heads, *self.faults])

    def _beside(self, gap: float, when: float) -> str:
        """The requests that there were in a gap which ended then, or those of them that took longest."""
        met = [sent for sent in self.sent if sent.began < when and sent.ended > when - gap]
        met.sort(key=lambda sent: sent.began - sent.ended)
        return "\n".join(f"  number {sent.number}: {sent.text:.150}" for sent in met[:SHOWN])


async def fuzz(folder: Path, seed: int, requests: int, at_a_time: int) -> Report:
    """Sends so many requests, half of them over HTTP."""
    model = save_model(folder / "model")
    save_adapter(model, folder / "adapters" / "red", 8, 0)
    (folder / "registry.yaml").write_text("adapters: {}\n")
    (folder / "batches").mkdir()
    places = {"adapters": "adapters", "adapter-registry": "registry.yaml", "batches": "batches"}
    flags = *(f"--{flag}={folder / name}" for flag, name in places.items()), *FLAGS
    report = Report()
    with StandInHub() as hub, Server(str(model), *flags, env={"HF_ENDPOINT": hub.url, "HF_TOKEN": ""}) as server:
        api, numbers = await asyncio.to_thread(read_api, server.url), iter(range(requests))
        command = sys.executable, "-m", "tests.fuzz.canary", server.address
        canary = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, cwd=ROOT)
        assert canary.stdout and await canary.stdout.readline() == b"ready\n"
        try:
            await asyncio.gather(*(attack(server, api, seed, numbers, report) for _ in range(at_a_time)))
        finally:
            written, _ = await canary.communicate(b"")  # which ends its standard input
        report.seen = Seen(**json.loads(written))
        await asyncio.to_thread(server.assert_nothing_is_held)
    report.faults += report.seen.faults
    report.faults += [line for line in server.log.splitlines() if line.startswith("Traceback")]
    return report


async def attack(server: Server, api: Api, seed: int, numbers: Iterator[int], report: Report) -> None:
    """One odd request after the other; its number and the seed make each."""
    http_port, grpc_port = (int(address.rpartition(":")[2]) for address in (server.url, server.address))
    async with grpc.aio.insecure_channel(server.address) as channel:
        for number in numbers:
            dice, began = random.Random(f"{seed} {number}"), time.monotonic()
            if number % 2 and dice.random() < 0.95:
                message = odd_message(dice)
                sent, (status, wrong) = str(message), await call(channel, message)
            else:
                request, port = (odd_frames(dice), grpc_port) if number % 2 else (odd_request(api, dice), http_port)
                sent, (status, wrong) = str(request), await send(port, request)
            report.statuses[status] += 1
            report.sent.append(Sent(number, sent, began, time.monotonic()))
            if wrong:
                report.faults.append(f"number {number}: {sent}\n  {wrong[:1500]}")
