"""Writes down what streams generate, a few times a second and all together, beside the engines."""

import asyncio
import logging
import time
from dataclasses import dataclass, field

from loraplex_protos.errors import UnavailableError
from loraplex_router.engine.output import Generation
from loraplex_router.journal.records import Record, encode_tokens
from loraplex_router.journal.stores import Store

FLUSH_SECONDS = 0.25  # tokens that are not written down when a router dies are generated again
TRY_AGAIN_SECONDS = 1.0  # after a failure
TOUCHES = 4  # how often a stream's time in the store is renewed while it has no new tokens, before it is over

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Entry:
    """A generation that is written down while it runs."""

    key: str
    generation: Generation
    record: bytes  # not written yet
    stored: asyncio.Future[bool]  # whether the record is, once that is known
    written: list[int] = field(default_factory=list)  # tokens, of each sequence
    touched: float = 0.0
    ended: bool = False

    def news(self) -> bytes:
        """What is not written yet."""
        parts = [self.record]
        for index, (output, start) in enumerate(zip(self.generation.outputs, self.written, strict=True)):
            sequence = output.sequence
            if new := sequence.tokens[sequence.prompt_length + start :]:
                parts.append(encode_tokens(index, start, new))
        return b"".join(parts)


class Journal:
    """Keeps entries in `store` for `seconds` after their last tokens. A store that fails costs streams nothing but that
    they cannot be resumed."""

    def __init__(self, store: Store, seconds: float) -> None:
        self._store = store
        self._touch_seconds = seconds / TOUCHES
        self._entries: dict[Generation, Entry] = {}
        self._news = asyncio.Event()
        self._writing = asyncio.Lock()
        self._failing = False

    @property
    def shared(self) -> bool:
        """Whether other routers can continue what is written down here."""
        return self._store.shared

    def begin(self, key: str, generation: Generation, record: Record) -> None:
        """Writes the generation down from now on, until `end`."""
        stored = asyncio.get_running_loop().create_future()
        if self._failing:
            stored.set_result(False)
            return
        written = [0] * len(generation.outputs)
        self._entries[generation] = Entry(key, generation, record.encode(), stored, written)
        self._news.set()

    async def has(self, generation: Generation) -> bool:
        """Whether the generation is written down, and so can be continued by others."""
        entry = self._entries.get(generation)
        return entry is not None and await entry.stored

    def end(self, generation: Generation) -> None:
        """The generation is over: its last tokens are still written down."""
        if entry := self._entries.get(generation):
            entry.ended = True

    async def read(self, key: str) -> bytes | None:
        """What an entry's store has. Raises UnavailableError."""
        return await self._store.read(key)

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            while True:
                if not self._entries and not self._failing:
                    await self._news.wait()
                self._news.clear()
                await self.flush()
                pause = TRY_AGAIN_SECONDS if self._failing else FLUSH_SECONDS
                try:
                    async with asyncio.timeout(pause):
                        await self._news.wait()
                except TimeoutError:
                    pass
        finally:
            await self._store.aclose()

    async def flush(self) -> None:
        """Writes down everything new."""
        async with self._writing:
            now = time.monotonic()
            news = {entry: entry.news() for entry in self._entries.values()}
            due = {e: part for e, part in news.items() if part or e.touched + self._touch_seconds < now}
            known = {entry: [output.sequence.output_length for output in entry.generation.outputs] for entry in due}
            ended = [entry for entry in news if entry.ended]
            if due or self._failing:
                await self._write(due, known, now)
            for entry in ended:
                self._entries.pop(entry.generation, None)

    async def _write(self, due: dict[Entry, bytes], known: dict[Entry, list[int]], now: float) -> None:
        try:
            await self._store.append({entry.key: part for entry, part in due.items()} or {"": b""})
        except UnavailableError as error:
            if not self._failing:
                logger.warning("streams cannot be resumed for now: %s", error.message)
            self._failing = True
            for entry in due:
                if not entry.stored.done():
                    entry.stored.set_result(False)
                    del self._entries[entry.generation]
            return
        if self._failing:
            logger.warning("streams can be resumed again")
        self._failing = False
        for entry in due:
            entry.record, entry.written, entry.touched = b"", known[entry], now
            if not entry.stored.done():
                entry.stored.set_result(True)
