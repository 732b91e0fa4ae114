"""`python -m bench.fairness`: what a tenant feels of another one's flood: the time to the first token of one request
after the other, alone and beside 200 requests at any time; and beside one request that fills the KV cache. Nothing else
should run at the same time.
"""

import asyncio
import hashlib
import json
import statistics
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

from bench.cold import save_adapter
from bench.engine.served import BLOCKS, VOCABULARY, serving
from bench.load import LoadError, percentile
from loraplex import AsyncClient

TENANTS = "loud", "quiet"  # also their keys
FLOOD, REQUESTS, ROUNDS = 200, 20, 3
TRIES = 20
PROMPT, OUTPUT = 64, 64  # of the flood; those of the quiet tenant have the same prompts and a few tokens
ANSWER = 2
BLOCK = 16
HUGE = BLOCKS * BLOCK * 9 // 10  # tokens of a prompt that takes nearly all blocks
CASES = {"on another adapter": ("a0", "a1"), "on the same adapter": ("a0", "a0"), "on the base": (None, None)}
WANTED = 1.5  # times of alone, and a step


class Bench:
    def __init__(self, server: dict[str, str], loud: AsyncClient, quiet: AsyncClient) -> None:
        self._metrics = f"http://{server['http']}/metrics"
        self._loud, self._quiet = loud, quiet
        self._random = Random(0)

    def prompt(self, length: int = PROMPT) -> list[int]:
        """One that was not sent before."""
        return self._random.choices(range(10, VOCABULARY), k=length)

    async def first_token(self, adapter: str | None, length: int = PROMPT) -> float | None:
        """Sends a request of the quiet tenant. Returns the seconds to its first token; None if that was no whole
        character, and came with the next one."""
        clock = asyncio.get_running_loop().time
        began, first, tokens = clock(), 0.0, 0
        prompt = self.prompt(length)
        async for piece in self._quiet.stream(prompt, adapter=adapter, max_new_tokens=ANSWER, ignore_eos=True):
            if not first:
                first, tokens = clock() - began, len(piece.tokens)
        return first if tokens == 1 else None

    async def first_tokens(self, adapter: str | None, count: int = REQUESTS) -> list[float]:
        found = []
        for _ in range(count):
            found.append(await whole(lambda: self.first_token(adapter)))
            await asyncio.sleep(self._random.random() * 0.05)
        return found

    @asynccontextmanager
    async def flood(self, adapter: str | None) -> AsyncIterator[None]:
        async def work() -> None:
            while True:
                await self._loud.generate(self.prompt(), adapter=adapter, max_new_tokens=OUTPUT, ignore_eos=True)

        tasks = [asyncio.create_task(work()) for _ in range(FLOOD)]
        try:
            await asyncio.sleep(2)
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.5)

    async def beside_a_huge_one(self) -> float | None:
        """As first_token, while one sequence holds nearly all blocks. Raises LoadError if it kept them."""
        yields = self.metric("loraplex_yields_total")
        huge = self._loud.stream(self.prompt(HUGE), max_new_tokens=BLOCKS * BLOCK - HUGE, ignore_eos=True)
        await anext(huge)
        try:
            first = await self.first_token(None, length=HUGE // 4)
        finally:
            await huge.aclose()
        if self.metric("loraplex_yields_total") == yields:
            raise LoadError("nothing had to be taken from the huge sequence")
        return first

    def steps(self) -> tuple[float, float]:
        """The seconds that all steps so far took, and their number."""
        return self.metric("loraplex_step_duration_seconds_sum"), self.metric("loraplex_step_duration_seconds_count")

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(self._metrics) as metrics:
            lines = metrics.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


async def whole(measure: Callable[[], Awaitable[float | None]]) -> float:
    """What is measured in the first of some tries whose answer began with a whole character."""
    for _ in range(TRIES):
        if (seconds := await measure()) is not None:
            return seconds
    raise LoadError("no answer begins with a whole character")


async def compare(server: dict[str, str]) -> None:
    loud, quiet = (AsyncClient(server["grpc"], api_key=tenant) for tenant in TENANTS)
    async with loud, quiet:
        bench = Bench(server, loud, quiet)
        for case, (flooded, asked) in CASES.items():
            await bench.first_tokens(flooded, 3)  # warms up
            await bench.first_tokens(asked, 3)
            rounds = []
            for _ in range(ROUNDS):
                alone = await bench.first_tokens(asked)
                async with bench.flood(flooded):
                    seconds, count = bench.steps()
                    beside = await bench.first_tokens(asked)
                    later, more = bench.steps()
                step = (later - seconds) / (more - count)
                rounds.append([percentile(times, share) for share in (50, 99) for times in (alone, beside)] + [step])
            report(case, [statistics.median(column) * 1e3 for column in zip(*rounds, strict=True)])
        alone = [await whole(lambda: bench.first_token(None, length=HUGE // 4)) for _ in range(ROUNDS)]
        beside = [await whole(bench.beside_a_huge_one) for _ in range(ROUNDS)]
        was, now = (statistics.median(times) * 1e3 for times in (alone, beside))
        print(f"beside one that fills the cache: {was:.0f} ms alone, {now:.0f} ms beside: {now / was:.2f} times")


def report(case: str, measured: list[float]) -> None:
    """Prints medians of rounds, in milliseconds."""
    step = measured.pop()
    print(f"{case}: a step beside takes {step:.1f} ms")
    for share, alone, beside in ((50, *measured[:2]), (99, *measured[2:])):
        wanted = WANTED * alone + step
        print(
            f"  first token, p{share}: {alone:.1f} ms alone, {beside:.1f} ms beside, {beside / alone:.2f} times; "
            f"wanted at most {wanted:.1f} ms: {'reached' if beside <= wanted else 'missed'}",
            flush=True,
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for name in ("a0", "a1"):
            save_adapter(root / "adapters" / name, 8)
        keys = {tenant: {"keys": [hashlib.sha256(tenant.encode()).hexdigest()]} for tenant in TENANTS}
        (root / "keys.yaml").write_text(json.dumps({"tenants": keys}))
        with serving(f"--adapters={root / 'adapters'}", f"--api-keys={root / 'keys.yaml'}") as server:
            asyncio.run(compare(server))


if __name__ == "__main__":
    main()
