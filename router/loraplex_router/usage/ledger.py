"""The totals of what was used, and how much of each stream is in them."""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Protocol

from loraplex_router.usage.event import Counted, Used
from loraplex_router.vocabulary.adapter import OTHER

MOST_ADAPTERS = 10_000  # of all tenants, counted by name in a day; the others share one entry
MOST_ACCOUNTS = 10_000
MOST_DAYS = 400

Totals = dict[tuple[str, str], Used]  # by tenant and adapter


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What a generation took, with all that other routers had generated of it."""

    number: int
    account: str  # the same for all generations that continue one stream
    tenant: str
    adapter: str
    used: Used | None  # None: it never ran
    stream: str = ""  # its key in the journal, if it is there
    router: str = ""  # which wrote it there; empty: this one


@dataclass(frozen=True, slots=True)
class Lost:
    """A generation whose router has died."""

    router: str
    data: bytes  # what the journal has of it; if it is not there, what its router said of it
    stream: str = ""  # its key in the journal, if it is there
    account: str = ""  # if it is not there


Running = Callable[[], Mapping[str, bytes]]  # what runs here and is not in the journal, by account


class Ledger(Protocol):
    async def settle(self, entries: Sequence[Entry]) -> list[Counted]:
        """Adds what is not counted yet, and returns it, with what lost routers have counted and not told. An entry with
        the same number as one before is the same one, and counts once. Raises UnavailableError if it may have failed:
        ask again."""
        ...

    async def told(self, entries: Sequence[Entry]) -> None:
        """The events of these settled entries have been told. Raises UnavailableError: say it again."""
        ...

    async def totals(self, days: Sequence[date]) -> Totals:
        """Raises UnavailableError."""
        ...

    async def since(self) -> float:
        """When it began, as a time.time. Raises UnavailableError."""
        ...

    async def lost(self, running: Running) -> list[Lost]:
        """Says that this router lives, and what runs here. Returns what ran on those that have died, until it is
        settled or dropped. Raises UnavailableError."""
        ...

    async def drop(self, lost: Lost) -> None:
        """It cannot be settled."""
        ...


class MemoryLedger:
    """Of one router, since it started."""

    def __init__(self) -> None:
        self._since = time.time()
        self._name = secrets.token_hex(8)
        self._days: dict[date, Totals] = {}
        self._accounts: dict[str, int] = {}  # the generated tokens that are counted, of streams

    async def settle(self, entries: Sequence[Entry]) -> list[Counted]:
        found = [self._settle(entry, entry.used) if entry.used else Used() for entry in entries]
        return [Counted(f"{self._name}.{entry.number}", used) for entry, used in zip(entries, found, strict=True)]

    async def told(self, entries: Sequence[Entry]) -> None:
        pass  # there is nobody else

    def _settle(self, entry: Entry, used: Used) -> Used:
        new = used
        if entry.stream:
            counted = self._accounts.pop(entry.account, None)
            new = used.beyond(counted)
            self._accounts[entry.account] = max(used.generated_tokens, counted or 0)
            if len(self._accounts) > MOST_ACCOUNTS:
                del self._accounts[next(iter(self._accounts))]
        totals = self._days.setdefault(today(), {})
        if len(self._days) > MOST_DAYS:
            del self._days[min(self._days)]
        key = entry.tenant, entry.adapter
        if key not in totals and len(totals) >= MOST_ADAPTERS:
            key = entry.tenant, OTHER
        totals[key] = totals.get(key, Used()) + new
        return new

    async def totals(self, days: Sequence[date]) -> Totals:
        return await asyncio.to_thread(add_up, [dict(self._days.get(day, {})) for day in days])

    async def since(self) -> float:
        return self._since

    async def lost(self, running: Running) -> list[Lost]:
        return []

    async def drop(self, lost: Lost) -> None:
        raise AssertionError("nothing is lost")


def add_up(days: Sequence[Totals]) -> Totals:
    """Called on a thread: there may be thousands of adapters, and many days."""
    found: Totals = {}
    for totals in days:
        for key, used in totals.items():
            found[key] = found.get(key, Used()) + used
    return found


def today() -> date:
    return datetime.now(UTC).date()
