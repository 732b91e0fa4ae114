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
from loraplex_router.engine.output import Generation
from loraplex_router.journal.records import Record, read_progress
from loraplex_router.usage.event import Counted, UsageEvent, Used, event_of, event_of_lost
from loraplex_router.usage.ledger import MOST_DAYS, Entry, Ledger, Lost, MemoryLedger, today

LIVE_SECONDS = 1.0  # between two signs of life, and looks at what routers that have died have left
MOST_UNSETTLED = 10_000  # entries while the ledger fails

logger = logging.getLogger(__name__)

Sink = Callable[[dict[str, Any]], None]


class _Ended(NamedTuple):
    event: UsageEvent
    entry: Entry
    alone: Used  # what it used as far as this router knows


class Usage:
    """`ledger`, `sinks`, which get each event, and `write_streams`, which brings the journal up to date, are set once,
    before anything ends."""

    def __init__(self) -> None:
        self.ledger: Ledger = MemoryLedger()
        self.sinks: list[Sink] = []
        self.write_streams: Callable[[], Awaitable[object]] | None = None
        self._numbers = count()
        self._unsettled: list[_Ended] = []
        self._told: list[Entry] = []  # and the ledger does not know yet
        self._news = asyncio.Event()
        self._settling = asyncio.Lock()

    def ended(self, generation: Generation, outcome: str, now: float) -> None:
        """A generation has ended now, by time.monotonic."""
        ran = generation.started is not None
        cached = generation.outputs[0].sequence.prefix_hit
        generated = sum(output.generated for output in generation.outputs)
        first = int(generation.num_prompt > 0)
        entry = Entry(
            next(self._numbers),
            generation.nonce,
            generation.tenant,
            generation.adapter_name,
            Used(1, generation.prompt_length, cached, generated) if ran else None,
            generation.stream,
        )
        alone = Used(first, generation.num_prompt, first * cached, generation.num_generated) if ran else Used()
        self._unsettled.append(_Ended(event_of(generation, outcome, now), entry, alone))
        self._news.set()

    async def between(self, first: date | None, last: date | None) -> tuple[float, list[tuple[str, str, Used]]]:
        """What each tenant used with each adapter in these days (UTC), both included, and since when (a time.time) it
        is counted. Raises UnavailableError."""
        await self.settle()
        last = min(last or today(), today())
        first = max(first or date.min, today() - timedelta(MOST_DAYS))
        totals = await self.ledger.totals([first + timedelta(days) for days in range((last - first).days + 1)])
        return await self.ledger.since(), [(*key, used) for key, used in sorted(totals.items())]

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            while True:
                self._news.clear()
                with suppress(UnavailableError):
                    await self.settle()
                    await self._find_lost()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LIVE_SECONDS):
                        await self._news.wait()
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
            while told := self._told[:1000]:
                await self.ledger.told(told)
                del self._told[: len(told)]

    async def _find_lost(self) -> None:
        lost = await self.ledger.lost()
        for each in lost:
            try:
                record, generated = read_progress(each.data)
            except (ValueError, TypeError, KeyError):
                await self.ledger.drop(each)
            else:
                self._unsettled.append(self._lost(each, record, generated))
        if lost:
            await self.settle()

    def _lost(self, lost: Lost, record: Record, generated: int) -> _Ended:
        used = Used(1, len(record.prompt), 0, generated)
        number, event = next(self._numbers), event_of_lost(record)
        entry = Entry(number, record.nonce, record.tenant, record.adapter, used, lost.stream, lost.router)
        return _Ended(event, entry, Used())

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
