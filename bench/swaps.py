"""`python -m bench.swaps`: replaces an uploaded adapter many times beside 16 streams that use it: swaps per second, the
streams' times between tokens with and without, and the memory of the server's processes. Nothing else should run at the
same time.
"""

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from bench.engine.served import BLOCKS, save_adapters
from bench.load import Workload, measure, percentile
from bench.processes import Loraplex
from bench.targets import GrpcTarget
from loraplex import AsyncClient, RateLimitedError

NAME, STREAMS, PROMPT, OUTPUT, VOCABULARY = "policy", 16, 64, 64, 10_000
FILES = "adapter_config.json", "adapter_model.safetensors"
REPORTS = 5  # of memory


class Policy:
    """An adapter (r=8 on all linear layers) that changes with every upload."""

    def __init__(self, client: AsyncClient, directory: Path) -> None:
        (name,) = save_adapters(directory, 1)
        self._client = client
        self._files = {file: bytearray((directory / name / file).read_bytes()) for file in FILES}
        self._uploads = 0

    async def upload(self) -> None:
        """Waits if the server allows no more uploads now."""
        self._uploads += 1
        tensors = self._files[FILES[1]]
        tensors[-4:] = np.float32(self._uploads * 1e-6).tobytes()  # the last number of the last tensor
        while True:
            try:
                await self._client.upload_adapter(NAME, {file: bytes(data) for file, data in self._files.items()})
                return
            except RateLimitedError:
                await asyncio.sleep(0.05)


async def gaps(target: GrpcTarget, seconds: float, done: asyncio.Event) -> list[float]:
    """The times between tokens of the streams, over so many seconds and until `done`."""
    found, began, run = list[float](), time.monotonic(), 0
    while time.monotonic() - began < seconds or not done.is_set():
        workload = Workload(STREAMS, STREAMS, PROMPT, OUTPUT, (NAME,), VOCABULARY, run)
        found += (await measure(target, workload, run)).gaps
        run += 1
    return found


async def swaps(server: Loraplex, address: str, count: int, directory: Path) -> None:
    client, target = AsyncClient(address), GrpcTarget(address)
    policy, done = Policy(client, directory), asyncio.Event()
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    await policy.upload()
    done.set()
    alone = await gaps(target, 30, done)
    done.clear()
    beside = asyncio.create_task(gaps(target, 0, done))
    spent = 0.0
    for number in range(1, count + 1):
        began = time.monotonic()
        await policy.upload()
        spent += time.monotonic() - began
        if number % (count // REPORTS) == 0:
            sizes = ", ".join(f"{process.memory_info().rss / 2**20:,.0f}" for process in processes)
            print(f"after {number:,} swaps: {number / spent:.1f} swaps/s; MiB of the processes: {sizes}", flush=True)
    done.set()
    for name, found in (("without", alone), ("with", await beside)):
        print(
            f"between tokens {name} swaps: p50 {percentile(found, 50) * 1e3:.1f} ms,"
            f" p99 {percentile(found, 99) * 1e3:.1f} ms"
        )
    await client.close()
    await target.close()


def main(count: Annotated[int, typer.Option(help="How many times the adapter is replaced.")] = 1000) -> None:
    """Measure swaps of an uploaded adapter."""
    with tempfile.TemporaryDirectory() as directory, Loraplex("serve", f"--kv-blocks={2 * BLOCKS}") as server:
        while not (addresses := server.addresses()):
            time.sleep(0.2)
        asyncio.run(swaps(server, addresses["grpc"], count, Path(directory)))


if __name__ == "__main__":
    typer.run(main)
