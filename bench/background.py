"""`python -m bench.background`: what others feel of background work: the time to the first token and the times between
tokens of one request after the other, with and without 32 background requests at any time. Nothing else should run at
the same time.
"""

import asyncio
import statistics
from contextlib import suppress
from random import Random

from bench.engine.served import serving
from bench.load import percentile
from loraplex import AsyncClient

REQUESTS, ROUNDS, BACKGROUND = 110, 3, 32  # so many that the first one, which meets a background step, is below 1 %
PROMPT, OUTPUT, VOCABULARY = 64, 32, 10_000
WANTED = 1.05


async def times(client: AsyncClient, random: Random) -> tuple[list[float], list[float]]:
    """The times to the first token, and between tokens, in seconds."""
    firsts, gaps = list[float](), list[float]()
    clock = asyncio.get_running_loop().time
    for _ in range(REQUESTS):
        last, first = clock(), True
        async for _piece in client.stream(prompt(random), max_new_tokens=OUTPUT, ignore_eos=True):
            now = clock()
            (firsts if first else gaps).append(now - last)
            last, first = now, False
        await asyncio.sleep(random.random() * 0.1)
    return firsts, gaps


async def work(client: AsyncClient, random: Random) -> None:
    while True:
        await client.generate(prompt(random), max_new_tokens=4 * OUTPUT, ignore_eos=True, background=True)


def prompt(random: Random) -> list[int]:
    return random.choices(range(10, VOCABULARY), k=PROMPT)


async def compare(address: str) -> None:
    random = Random(0)
    async with AsyncClient(address) as client:
        await times(client, random)  # warms up
        ratios: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            alone = await times(client, random)
            others = [asyncio.create_task(work(client, random)) for _ in range(BACKGROUND)]
            await asyncio.sleep(2)
            beside = await times(client, random)
            for other in others:
                other.cancel()
                with suppress(asyncio.CancelledError):
                    await other
            for name, one, two in zip(("first token", "between tokens"), alone, beside, strict=True):
                for share in (50, 99):
                    was, now = percentile(one, share), percentile(two, share)
                    ratios.setdefault(f"{name}, p{share}", []).append(now / was)
                    print(f"{name}, p{share}: {was * 1e3:.1f} ms alone, {now * 1e3:.1f} ms beside", flush=True)
    for name, found in ratios.items():
        print(f"{name}: beside ÷ alone {statistics.median(found):.2f}, wanted at most {WANTED}")


def main() -> None:
    with serving() as addresses:
        asyncio.run(compare(addresses["grpc"]))


if __name__ == "__main__":
    main()
