"""Writes down what streams generate: all that is new, for all streams together, before their clients see it."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from loraplex_protos.errors import UnavailableError
from loraplex_router.engine.generation import Generation
from loraplex_router.journal.records import Record, encode_tokens
from loraplex_router.journal.stores import Store

LOOK_SECONDS = 1.0  # between two looks at streams that nobody waits for, and at a store that has failed
TOUCHES = 4  # how often a stream's time in the store is renewed before it is over

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Entry:
    """A generation that is written down while it runs."""

    key: str
    generation: Generation
    record: bytes
    written: list[int] = field(default_factory=list)  # tokens, of each sequence
    touched: float = 0.0  # when its time in the store was renewed; 0: the store has nothing of it
    ended: bool = False

    @property
    def lengths(self) -> list[int]:
        """How many tokens each sequence has."""
        return [output.sequence.output_length for output in self.generation.outputs]

    def news(self) -> bytes:
        """The tokens that are not written yet."""
        parts = list[bytes]()
        for index, (output, start) in enumerate(zip(self.generation.outputs, self.written, strict=True)):
            sequence = output.sequence
            if new := sequence.tokens[sequence.prompt_length + start :]:
                parts.append(encode_tokens(index, start, new))
        return b"".join(parts)


class Journal:
    """Keeps entries in `store`, which forgets what was not renewed for `seconds`. A store that fails costs streams a
    second, and that those which it does not have yet cannot be resumed until it is back."""

    def __init__(self, store: Store, seconds: float) -> None:
        self._store = store
        self._touch_seconds = seconds / TOUCHES
        self._entries: dict[Generation, Entry] = {}
        self._news = asyncio.Event()
        self._writing = asyncio.Lock()
        self._next_write = asyncio.Event()  # set when the write that begins next has ended
        self._fails: bool | None = None  # whether the store did when it was asked last; None: it was not

    @property
    def shared(self) -> bool:
        """Whether other routers can continue what is written down here."""
        return self._store.shared

    def begin(self, key: str, generation: Generation, record: Record) -> None:
        """Writes the generation down from now on, until `end`."""
        self._entries[generation] = Entry(key, generation, record.encode(), [0] * len(generation.outputs))

    async def keep_up(self, generation: Generation) -> bool:
        """Returns once everything that it has generated is written down, or cannot be now. False: it is not written
        down at all yet."""
        entry = self._entries.get(generation)
        if entry is not None and not self._fails and (not entry.touched or entry.written != entry.lengths):
            written = self._next_write
            self._news.set()
            await written.wait()
        return entry is not None and entry.touched > 0

    def end(self, generation: Generation) -> None:
        """The generation is over: its last tokens are still written down."""
        if entry := self._entries.get(generation):
            entry.ended = True

    async def read(self, key: str) -> bytes | None:
        """What is written down for an entry. Raises UnavailableError."""
        return await self._store.read(key)

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            while True:
                self._news.clear()
                await self.flush()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._news.wait()
        finally:
            self._fails = True
            self._next_write.set()

    async def flush(self) -> None:
        """Writes down everything new."""
        async with self._writing:
            ended, self._next_write = self._next_write, asyncio.Event()
            try:
                await self._flush()
            finally:
                ended.set()

    async def _flush(self) -> None:
        entries = list(self._entries.values())
        over = [entry for entry in entries if entry.ended]
        try:
            if await self._write(entries):
                await self._write(entries)  # all of those that the store has lost
        except UnavailableError as error:
            if not self._fails:
                logger.warning("streams cannot be resumed for now: %s", error.message)
            self._fails = True
        else:
            if self._fails:
                logger.warning("streams can be resumed again")
            self._fails = False
        for entry in over:
            self._entries.pop(entry.generation, None)

    async def _write(self, entries: Sequence[Entry]) -> bool:
        """Writes down what is new of the entries. Returns whether the store has lost what it had of some, as one that
        is emptied or starts anew does: these count as not written then. Raises UnavailableError."""
        now = time.monotonic()
        due = [entry for entry in entries if not entry.touched or entry.touched + self._touch_seconds < now]
        parts = dict.fromkeys((entry.key for entry in due), b"")
        parts |= {entry.key: part for entry in entries if (part := entry.news())}
        if not parts and self._fails is False:
            return False
        lengths = [entry.lengths for entry in entries]
        records = {entry.key: entry.record for entry in due if not entry.touched}
        begun = {
            entry.key: entry.generation.tenant
            for entry in due
            if entry.key in records or not entry.generation.finished  # if others took it for dead
        }
        lost = frozenset(await self._store.append(parts, records, begun))
        for entry, written in zip(entries, lengths, strict=True):
            entry.written = written
        for entry in due:
            entry.touched = now
        for entry in entries:
            if entry.key in lost:
                entry.written, entry.touched = [0] * len(entry.written), 0.0
        return bool(lost)
