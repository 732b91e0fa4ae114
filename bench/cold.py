"""`python -m bench.cold`: the time from the first request for an adapter to its first token, by the adapter's source
and size; and the inter-token p99 of 16 other streams meanwhile, compared with the same streams alone.

The hub and S3 are stand-ins on loopback, so their network takes no time. Nothing else should run at the same time.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console

from bench.engine.served import VOCABULARY, serving
from bench.load import percentile
from bench.peft_target import load_model
from bench.stand_in_sources import BUCKET, serving_sources
from loraplex import AdapterReference, AsyncClient

LORA_RANKS = 8, 64, 256  # on all linear layers
SOURCES = "local", "hub", "s3"
STREAMS, OUTPUT, PROMPT = 16, 256, 16
WANTED = 1.1


def save_adapter(directory: Path, lora_rank: int) -> Path:
    config = LoraConfig(r=lora_rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(load_model("default"), config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(std=0.01)
    model.save_pretrained(str(directory))
    return directory


class Neighbours:
    """Streams of the base model that never pause, and the seconds between their tokens."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._random = Random(0)
        self.gaps: list[float] = []

    @asynccontextmanager
    async def streaming(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._stream()) for _ in range(STREAMS)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stream(self) -> None:
        while True:
            prompt = self._random.choices(range(10, VOCABULARY), k=PROMPT)
            last = None
            async for piece in self._client.stream(prompt, max_new_tokens=OUTPUT, ignore_eos=True):
                now = time.perf_counter()
                if last is not None and piece.tokens:
                    self.gaps += [(now - last) / len(piece.tokens)] * len(piece.tokens)
                last = now


async def first_tokens(client: AsyncClient, names: list[str], source: str) -> list[float]:
    """The seconds to the first token of each adapter, one after the other."""
    spent = []
    for name in names:
        began = time.perf_counter()
        adapter = AdapterReference(name, source=source)
        await client.generate([1, 2, 3, 4], adapter=adapter, max_new_tokens=1, ignore_eos=True)
        spent.append(time.perf_counter() - began)
        await client.unload_adapter(name, source=source, wait=True)
    return spent


async def run(address: str, names: dict[int, list[str]], rounds: int) -> None:
    """Each round has adapters of its own: they are cold once."""
    console = Console()
    async with AsyncClient(address) as client:
        neighbours = Neighbours(client)
        async with neighbours.streaming():
            await asyncio.sleep(5)
            for lora_rank, own in names.items():
                for source in SOURCES:
                    spent: list[float] = []
                    alone, meanwhile = list[float](), list[float]()
                    each = len(own) // rounds
                    for number in range(rounds):
                        neighbours.gaps.clear()
                        spent += await first_tokens(client, own[number * each : (number + 1) * each], source)
                        meanwhile += neighbours.gaps
                        neighbours.gaps.clear()
                        await asyncio.sleep(sum(spent[-each:]))
                        alone += neighbours.gaps
                    p99 = [percentile(gaps, 99) * 1e3 for gaps in (alone, meanwhile)]
                    mark = "[green]" if p99[1] <= WANTED * p99[0] else "[yellow]"
                    console.print(
                        f"r={lora_rank:<4} {source:6} first token after {statistics.median(spent) * 1e3:6.0f} ms; "
                        f"p99 of {STREAMS} streams {p99[0]:.0f} -> {p99[1]:.0f} ms, {mark}{p99[1] / p99[0]:.2f}[/] "
                        f"(wanted: at most {WANTED})",
                        soft_wrap=True,
                    )


def cold(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds with and without cold adapters, in turns.")] = 3,
    each: Annotated[int, typer.Option(min=1, help="Cold adapters per round, source and size.")] = 2,
) -> None:
    """Measure cold adapters of three sizes from three sources."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        names = {r: [f"bench/r{r}-{number}" for number in range(rounds * each)] for r in LORA_RANKS}
        folders = {}
        for lora_rank, own in names.items():
            saved = save_adapter(root / "saved" / str(lora_rank), lora_rank)
            for name in own:
                (root / "local" / name).mkdir(parents=True)
                for path in saved.iterdir():
                    os.link(path, root / "local" / name / path.name)
                folders[name] = saved
        with serving_sources(folders) as variables:
            os.environ |= {**variables, "HF_HOME": str(root / "cache"), "HF_HUB_DISABLE_XET": "1"}
            flags = f"--adapters={root / 'local'}", f"--adapters-s3=s3://{BUCKET}"
            with serving(*flags) as addresses:
                asyncio.run(run(addresses["grpc"], names, rounds))


if __name__ == "__main__":
    typer.run(cold)
