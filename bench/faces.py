"""`python -m bench.faces`: what the router costs per token and per request over each face, and what grammars cost.

The router is a real process with real clients, in front of a shard without a model. Only the processor time of the
router's process counts. The cost of a grammar is measured on a whole server; nothing else should run at the same time.
"""

import asyncio
import statistics
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
from rich.console import Console

from bench.load import Request, Target, Workload, measure
from bench.processes import Loraplex
from bench.stand_in_shard import StandInServer, StandInShard, Timing
from bench.targets import OVER_CHAT, OVER_GRPC, OVER_HTTP, OVER_RESPONSES, open_target
from loraplex import AsyncClient, Regex

STREAMS, RUNS = 32, 5
STEP_SECONDS = 0.02
SHORT, LONG = 2, 130  # tokens of an answer: the difference in cost is the cost of the additional tokens
FACES = {"grpc": (OVER_GRPC, 40), "SSE": (OVER_HTTP, 60)}  # and the target, in microseconds per token


class GrammarTarget:
    """A server over gRPC. All answers follow the grammar, if there is one."""

    def __init__(self, address: str, grammar: Regex | None) -> None:
        self._client = AsyncClient(address, max_retries=0)
        self._grammar = grammar

    async def adapters(self) -> list[str]:
        return []

    async def generate(self, request: Request) -> AsyncIterator[int]:
        pieces = self._client.stream(
            request.prompt,
            max_new_tokens=request.output_tokens,
            ignore_eos=self._grammar
            is None,  # with a grammar, an answer ends where the grammar does, which is after `output_tokens`
            grammar=self._grammar,
        )
        async for piece in pieces:
            yield len(piece.tokens)

    async def close(self) -> None:
        await self._client.close()


@asynccontextmanager
async def running(command: Loraplex) -> AsyncIterator[tuple[psutil.Process, dict[str, str]]]:
    """Waits until the command is ready, and gives its process and its addresses."""
    with command as server:
        while not (addresses := server.addresses()):
            await asyncio.sleep(0.1)  # not time.sleep: the stand-in answers in this loop
        yield psutil.Process(server.process.pid), addresses


async def router_seconds(router: psutil.Process, target: Target, output_tokens: int) -> float:
    """The router's processor time per request while 32 streams run: the median of several runs."""
    workload = Workload(STREAMS, 4 * STREAMS, 16, output_tokens, (), 1000, 0)
    spent = []
    for number in range(RUNS):
        await measure(target, workload, number)
        before = sum(router.cpu_times()[:2])
        await measure(target, workload, number)
        spent.append((sum(router.cpu_times()[:2]) - before) / (workload.requests + STREAMS))
    return statistics.median(spent)


async def router_costs(console: Console) -> None:
    with tempfile.TemporaryDirectory() as directory:
        listen = f"unix:{directory}/shard"
        shard = StandInServer(StandInShard(Timing(step=STEP_SECONDS)), listen)  # type: ignore[abstract]
        router, bare = Loraplex("router", "--shards", listen), Loraplex.bare(STEP_SECONDS)
        async with shard, running(router) as ours, running(bare) as floor:
            for face, (form, wanted) in FACES.items():
                token, rest = await costs(form, *ours)
                least, _ = await costs(form, *floor)
                console.print(
                    f"router, {STREAMS} streams over {face}: {token * 1e6:.0f} us per token (target: {wanted}; "
                    f"a bare server needs {least * 1e6:.0f}), {rest * 1e3:.2f} ms per request"
                )
            chat, responses = [await costs(form, *ours) for form in (OVER_CHAT, OVER_RESPONSES)]
            for face, (token, rest) in (("chat completions", chat), ("responses", responses)):
                console.print(f"router, over {face}: {token * 1e6:.0f} us per token, {rest * 1e3:.2f} ms per request")
            console.print(f"responses ÷ chat completions, per token: {responses[0] / chat[0]:.2f} (target: 1.20)")


async def costs(form: str, process: psutil.Process, addresses: dict[str, str]) -> tuple[float, float]:
    """Processor time per token, and for the rest of a request."""
    target = open_target(form.format(**addresses), None)
    short, long = [await router_seconds(process, target, tokens) for tokens in (SHORT, LONG)]
    await target.close()
    token = (long - short) / (LONG - SHORT)
    return token, short - SHORT * token


async def grammar_cost(console: Console) -> None:
    async with running(Loraplex("serve")) as (_, addresses):
        workload = Workload(STREAMS, 2 * STREAMS, 32, 48, (), 10_000, 0)
        targets = [GrammarTarget(addresses["grpc"], grammar) for grammar in (None, Regex("([a-z]{1,9} ){200}"))]
        speeds: list[list[float]] = [[], []]
        for number in range(RUNS):
            for target, mine in zip(targets, speeds, strict=True):
                mine.append((await measure(target, workload, number)).tokens_per_second)
        free, bound = map(statistics.median, speeds)
        for target in targets:
            await target.close()
    console.print(f"structured ÷ free output, {STREAMS} streams, tokens/s: {bound / free:.2f} (target: 0.90)")


async def main() -> None:
    console = Console(soft_wrap=True)
    await router_costs(console)
    await grammar_cost(console)


if __name__ == "__main__":
    asyncio.run(main())
