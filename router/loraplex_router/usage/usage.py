"""Counts what requests have used when they have ended, and tells of each."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import date, timedelta
from itertools import count
from typing import Any, NamedTuple

from loraplex_protos.errors import UnavailableError
from loraplex_router.engine.generation import Generation
from loraplex_router.usage import left
from loraplex_router.usage.event import Counted, UsageEvent, Used, event_of, used_by
from loraplex_router.usage.ledger import MOST_DAYS, Entry, Ledger, MemoryLedger, today

LIVE_SECONDS = 1.0  # between two signs of life, with what runs, and looks at what routers that have died have left
MOST_UNSETTLED = 10_000  # entries while the ledger fails

logger = logging.getLogger(__name__)

Sink = Callable[[dict[str, Any]], None]


class _Ended(NamedTuple):
    event: UsageEvent
    entry: Entry
    alone: Used  # what it used as far as this router knows


class Usage:
    """`ledger`, `sinks`, which get each event, `written`, which returns when the sinks have kept what they got, and
    `write_streams`, which brings the journal up to date, are set once, before anything ends."""

    def __init__(self) -> None:
        self.ledger: Ledger = MemoryLedger()
        self.sinks: list[Sink] = []
        self.written: Callable[[], Awaitable[object]] | None = None
        self.write_streams: Callable[[], Awaitable[object]] | None = None
        self._numbers = count()
        self._running: set[Generation] = set()
        self._unsettled: list[_Ended] = []
        self._told: list[Entry] = []  # and the ledger does not know yet
        self._news = asyncio.Event()
        self._settling = asyncio.Lock()

    def started(self, generation: Generation) -> None:
        """A generation begins to use something."""
        self._running.add(generation)

    def ended(self, generation: Generation, outcome: str, now: float) -> None:
        """A generation has ended now, by time.monotonic."""
        self._running.discard(generation)
        ran, used, first = generation.started is not None, used_by(generation), int(generation.num_prompt > 0)
        entry = Entry(
            next(self._numbers),
            generation.nonce,
            generation.tenant,
            generation.adapter_name,
            used if ran else None,
            generation.stream,
        )
        alone = Used(first, generation.num_prompt, first * used.cached_tokens, generation.num_generated)
        self._unsettled.append(_Ended(event_of(generation, outcome, now), entry, alone if ran else Used()))
        self._news.set()

    async def between(self, first: date | None, last: date | None) -> tuple[float, list[tuple[str, str, Used]]]:
        """What each tenant used with each adapter in these days (UTC), both included, and since when (a time.time) it
        is counted. Raises UnavailableError."""
        await self.settle()
        last = min(last or today(), today())
        first = max(first or date.min, today() - timedelta(MOST_DAYS))
        totals = await self.ledger.totals([first + timedelta(days) for days in range((last - first).days + 1)])
        rows = await asyncio.to_thread(lambda: [(*key, used) for key, used in sorted(totals.items())])
        return await self.ledger.since(), rows

    async def run(self) -> None:
        """Runs until cancelled."""
        loop = asyncio.get_running_loop()
        next_sign = loop.time()
        try:
            while True:
                self._news.clear()
                due = loop.time() >= next_sign
                try:
                    await self.settle()
                    if due:
                        await self._find_lost()
                    news = self._news
                except UnavailableError:
                    news = asyncio.Event()  # it is left alone until the next sign of life, whatever ends
                if due:
                    next_sign = loop.time() + LIVE_SECONDS
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(next_sign):
                        await news.wait()
        finally:
            with suppress(UnavailableError):
                await self.settle()
            self._give_up(self._unsettled)

    async def settle(self) -> None:
        """Counts everything that has ended. Raises UnavailableError."""
        async with self._settling:
            while ended := self._unsettled[:1000]:
                if self.write_streams and any(each.entry.stream for each in ended):
                    await self.write_streams()
                try:
                    found = await self.ledger.settle([each.entry for each in ended])
                except UnavailableError:
                    self._give_up(self._unsettled[:-MOST_UNSETTLED])
                    raise
                del self._unsettled[: len(ended)]
                for each, counted in zip(ended, found, strict=True):
                    if not each.entry.router or counted.used != Used():
                        self._tell(each.event, counted)
                    self._told.append(each.entry)
            if self.written and self._told:  # before that, another router has to tell of them if this one is killed
                await self.written()
            while told := self._told[:1000]:
                await self.ledger.told(told)
                del self._told[: len(told)]

    async def _find_lost(self) -> None:
        lost = await self.ledger.lost(self._encode_running)
        for each in lost:
            try:
                event, entry = left.read(each, next(self._numbers))
            except (ValueError, TypeError, KeyError):
                await self.ledger.drop(each)
            else:
                self._unsettled.append(_Ended(event, entry, Used()))
        if lost:
            await self.settle()

    def _encode_running(self) -> dict[str, bytes]:
        """What runs here and is not in the journal, by account."""
        here = [generation for generation in self._running if not generation.stream]
        return {generation.nonce: left.encode(generation) for generation in here}

    def _give_up(self, ended: Sequence[_Ended]) -> None:
        """Tells of what cannot be settled."""
        if ended:
            logger.error("the usage of %d requests is not in the store, which does not answer", len(ended))
        for each in list(ended):
            self._unsettled.remove(each)
            if not each.entry.router:
                self._tell(each.event, Counted(secrets.token_hex(8), each.alone))

    def _tell(self, event: UsageEvent, counted: Counted) -> None:
        if self.sinks:
            described = event.describe(counted)
            for sink in self.sinks:
                sink(described)
