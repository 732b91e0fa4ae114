"""A closed loop of requests against a target, and its measurements. Does not know how a target is reached."""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class LoadError(Exception):
    """The target did not do what it was asked to do, so a measurement would mean nothing."""


@dataclass(frozen=True, slots=True)
class Request:
    prompt: list[int]  # token ids
    output_tokens: int
    adapter: str | None  # None: the base model


class Target(Protocol):
    """What is measured. All prompts of a workload have the same length."""

    async def adapters(self) -> list[str]:
        """The names of its adapters."""
        ...

    def generate(self, request: Request) -> AsyncIterator[int]:
        """Yields the number of tokens each time some arrive. Generation continues past end tokens."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Workload:
    """`concurrency` workers, which each send the next request once the last one is answered.

    Requests use the adapters in turn; without adapters, the base model. Prompts are random token ids below
    `vocab_size`. They are different in each request, so that a prefix cache does not help, and the same for every
    target.
    """

    concurrency: int
    requests: int  # measured in one run, after the warm-up
    prompt_tokens: int
    output_tokens: int
    adapters: tuple[str, ...]
    vocab_size: int
    seed: int

    def warm_up(self, run: int) -> Iterator[Request]:
        """Keeps all workers busy and uses every adapter once."""
        return (self._request(f"{run}/warm-up", i) for i in range(max(self.concurrency, len(self.adapters))))

    def measured(self, run: int) -> Iterator[Request]:
        return (self._request(f"{run}", i) for i in range(self.requests))

    def _request(self, part: str, number: int) -> Request:
        ids = random.Random(f"{self.seed}/{part}/{number}")
        return Request(
            prompt=[ids.randrange(self.vocab_size) for _ in range(self.prompt_tokens)],
            output_tokens=self.output_tokens,
            adapter=self.adapters[number % len(self.adapters)] if self.adapters else None,
        )


@dataclass(slots=True)
class Run:
    """The measurements of one run; times are in seconds."""

    duration: float = 0.0
    output_tokens: int = 0
    first_tokens: list[float] = field(default_factory=list)  # one per request, from sending it to its first token
    gaps: list[float] = field(default_factory=list)  # one per further token; tokens that arrive together share one

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.duration


async def measure(target: Target, workload: Workload, run: int) -> Run:
    """Warms the target up, then measures. Raises LoadError if an answer does not have the requested length."""
    await _drive(target, workload.warm_up(run), workload.concurrency)
    return await _drive(target, workload.measured(run), workload.concurrency)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is not exceeded by at least this percentage of the values (nearest rank)."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


async def _drive(target: Target, requests: Iterator[Request], concurrency: int) -> Run:
    run = Run()

    async def work() -> None:
        for request in requests:  # shared by the workers
            await _time(target, request, run)

    started = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(concurrency):
                workers.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    run.duration = time.perf_counter() - started
    return run


async def _time(target: Target, request: Request, run: Run) -> None:
    received = 0
    last = time.perf_counter()
    async for count in target.generate(request):
        if count:
            gap = time.perf_counter() - last
            last += gap
            if received:
                run.gaps += [gap / count] * count
            else:
                run.first_tokens.append(gap)
                run.gaps += [0.0] * (count - 1)
            received += count
    if received != request.output_tokens:
        raise LoadError(
            f"{received} tokens arrived instead of {request.output_tokens}, although end tokens should be ignored"
        )
    run.output_tokens += received
