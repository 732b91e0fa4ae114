"""`python -m bench.simulate_replicas`: how much adapter affinity saves, with many replicas and adapters on one machine.

It runs the router's own placement, scheduling and adapter handling over stand-in shards behind real gRPC. The adapters'
popularity follows Zipf's law; requests arrive at random times (a Poisson process). Round robin is the same router with
another placement.
"""

import asyncio
import random
import statistics
import tempfile
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

from bench.stand_in_shard import StandInServer, StandInShard, Timing
from loraplex_router.access.keys import Keys
from loraplex_router.adapters.registry import Registry
from loraplex_router.adapters.resolutions import Resolutions
from loraplex_router.replicas.administration import Administration
from loraplex_router.replicas.connections import Connections
from loraplex_router.replicas.declarations import Declarations
from loraplex_router.replicas.prefetching import Prefetching
from loraplex_router.replicas.replica import Replica
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.replicas.uploads import Uploads
from loraplex_router.service.service import Service
from loraplex_router.settings import RouterSettings
from loraplex_router.telemetry.opening import open_telemetry
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_router.vocabulary.references import AdapterReference, Reference
from loraplex_router.vocabulary.request import Request

TIMING = Timing(step=0.02, stage=0.05, load=0.05)
MAX_LATE = 0.2  # seconds; a machine that stalls for longer than this makes the waits meaningless


@dataclass(frozen=True, slots=True)
class Load:
    replicas: int = 10
    adapters: int = 5000
    slots: int = 32  # per replica
    host_mib: int = 200  # per replica; an adapter has 1 MiB
    requests_per_second: float = 60
    warm_up_seconds: float = 15
    seconds: float = 30
    tokens: int = 16
    exponent: float = 1.0  # of Zipf's law


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results after the warm-up. `waits` has the seconds from each valid request to its first step."""

    staged: float  # adapters staged to host memory, per request
    loaded: float  # adapters loaded from there to a device, per request
    waits: list[float]
    late: float  # the longest delay of a request's sending, in seconds, because the machine was busy

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.waits, n=100)[98]


class RoundRobin(Replicas):
    """Chooses one replica after the other, whatever adapters they have."""

    def __init__(self, telemetry: Telemetry, move_seconds: float) -> None:
        super().__init__(telemetry, move_seconds)
        self._turns = count()

    def choose(self, reference: Reference | None, without: Iterable[Replica] = ()) -> Replica:
        replicas = sorted(self, key=lambda replica: replica.name)
        return replicas[next(self._turns) % len(replicas)]


async def simulate(kind: type[Replicas], load: Load) -> Outcome:
    """Runs the load on its own router."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        shards = [StandInShard(TIMING) for _ in range(load.replicas)]  # type: ignore[abstract]
        addresses = tuple(f"unix:{folder}/{number}" for number in range(load.replicas))
        for shard, address in zip(shards, addresses, strict=True):
            await stack.enter_async_context(StandInServer(shard, address))
        settings = RouterSettings(
            shards=addresses, max_adapters_on_device=load.slots, adapter_host_gib=load.host_mib / 1024
        )
        telemetry = stack.enter_context(open_telemetry(settings))
        resolutions, replicas = Resolutions(), kind(telemetry, move_seconds=1)
        registry = Registry()
        administration = Administration(resolutions, replicas, registry, Prefetching(registry, replicas, 0))
        declarations = Declarations(administration, None)
        uploads = Uploads(administration, declarations, replicas, most_bytes=0)
        service = Service(replicas, administration, uploads, declarations, Keys({}), 100_000, telemetry)
        connections = asyncio.create_task(Connections(settings, replicas, resolutions, service.serve, telemetry).run())
        while len(list(replicas)) < load.replicas:
            await asyncio.sleep(0.01)
        await _send(service, load, load.warm_up_seconds, seed=0)
        before = sum(shard.stages for shard in shards), sum(shard.loads for shard in shards)
        waits, late = await _send(service, load, load.seconds, seed=1)
        stages, loads = sum(shard.stages for shard in shards), sum(shard.loads for shard in shards)
        connections.cancel()
        await asyncio.gather(connections, return_exceptions=True)
        return Outcome((stages - before[0]) / len(waits), (loads - before[1]) / len(waits), waits, late)


async def _send(service: Service, load: Load, seconds: float, seed: int) -> tuple[list[float], float]:
    """Sends requests for this many seconds. Returns their waits once all are answered, and the longest delay in sending
    one."""
    chance, loop = random.Random(seed), asyncio.get_running_loop()
    weights = list(accumulate(rank**-load.exponent for rank in range(1, load.adapters + 1)))
    requests: list[asyncio.Task[float]] = []
    began, due, late = loop.time(), 0.0, 0.0
    while (due := due + chance.expovariate(load.requests_per_second)) < seconds:
        await asyncio.sleep(began + due - loop.time())
        late = max(late, loop.time() - began - due)
        (number,) = chance.choices(range(load.adapters), cum_weights=weights)
        requests.append(asyncio.create_task(_wait(service, f"adapter-{number}", load.tokens)))
    return await asyncio.gather(*requests), late


async def _wait(service: Service, adapter: str, tokens: int) -> float:
    request = Request(prompt=(1,), adapter=AdapterReference(adapter), max_new_tokens=tokens)
    generation = await service.generate(request)
    try:
        await generation.collect()
    finally:
        service.requests.close(generation)
    assert generation.started is not None
    return generation.started - generation.validated


def draw(outcomes: dict[str, Outcome], path: Path) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loads, waits = figure.subplots(1, 2)
    for place, (name, outcome) in enumerate(outcomes.items()):
        in_place = [100 * (1 - outcome.loaded), 100 * (1 - outcome.staged)]
        bars = loads.bar([x + 0.4 * place - 0.2 for x in range(2)], in_place, 0.36, label=name)
        loads.bar_label(bars, fmt="%.0f %%")
        milliseconds = [1000 * wait for wait in sorted(outcome.waits)]
        percents = [100 * (number + 1) / len(milliseconds) for number in range(len(milliseconds))]
        waits.plot(milliseconds, percents, label=f"{name}: p99 {1000 * outcome.p99:.0f} ms")
    loads.set(xticks=range(2), xticklabels=["on the device", "in host memory"], ylim=(0, 110))
    loads.set_title("Requests whose adapter is in place, %", fontsize=10)
    waits.set(xscale="log", xlabel="ms", ylim=(0, 101))
    waits.set_title("Requests that wait at most this long for their first step, %", fontsize=10)
    for axes in (loads, waits):
        axes.legend(fontsize=8, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main(
    seconds: Annotated[float, typer.Option(help="How long to measure each of the two.")] = 30,
    plot: Annotated[Path, typer.Option(help="Image file to draw the plot to.")] = Path("docs/affinity.svg"),
) -> None:
    """Compare adapter affinity with round robin."""
    load = Load(seconds=seconds)
    kinds = {"affinity": Replicas, "round robin": RoundRobin}
    outcomes = {name: asyncio.run(simulate(kind, load)) for name, kind in kinds.items()}
    for name, outcome in outcomes.items():
        in_place = f"{1 - outcome.loaded:.1%} on the device, {1 - outcome.staged:.1%} in host memory"
        typer.echo(f"{name}: {in_place}, p99 wait {1000 * outcome.p99:.0f} ms, {len(outcome.waits)} requests")
        if outcome.late > MAX_LATE:
            typer.echo(f"ignore its waits: the machine was busy with something else for {outcome.late:.1f} s")
    draw(outcomes, plot)


if __name__ == "__main__":
    typer.run(main)
