"""How far a client has got in a streamed answer. The id of each event says it, so that the stream can be resumed."""

import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self
from zlib import crc32

_REACHED = re.compile(r"(?:(\d{1,9})\.(\d{1,9})\.)?(\d{1,9})-([0-9a-f]{8})")
_POSITION = re.compile(r"([A-Za-z0-9_-]{1,64}):([^:]{1,4096})(?::(\d{1,3}))?")


def checksum(tokens: Iterable[int], before: int = 0) -> int:
    """The checksum of tokens that follow those with the checksum `before`."""
    return crc32(array("I", tokens).tobytes(), before)


@dataclass(frozen=True, slots=True)
class Reached:
    """How far a client has got in one sequence: to the end of a delta, or to one of the events that it is written
    as."""

    tokens: int = 0  # the sequence's, up to the end of the delta
    checksum: int = 0  # of these tokens
    before: int = 0  # the tokens up to the delta's beginning, if only a part of it has arrived
    events: int | None = None  # how many of the delta's events have arrived; None: all

    def __str__(self) -> str:
        part = "" if self.events is None else f"{self.before}.{self.events}."
        return f"{part}{self.tokens}-{self.checksum:08x}"

    @classmethod
    def read(cls, text: str) -> Self:
        """Raises ValueError."""
        if not (found := _REACHED.fullmatch(text)):
            raise ValueError(text)
        before, events, tokens, check = found.groups()
        return cls(int(tokens), int(check, 16), int(before or 0), None if events is None else int(events))


@dataclass(frozen=True, slots=True)
class Position:
    """How far a client has got in a stream."""

    stream: str  # its id, which nobody can guess
    reached: tuple[Reached, ...]  # in each of its sequences
    afterwards: int = 0  # events behind the last delta

    def __str__(self) -> str:
        end = f":{self.afterwards}" if self.afterwards else ""
        return f"{self.stream}:{','.join(map(str, self.reached))}{end}"

    @classmethod
    def read(cls, text: str) -> Self:
        """Raises ValueError."""
        if not (found := _POSITION.fullmatch(text)):
            raise ValueError(text)
        stream, reached, afterwards = found.groups()
        return cls(stream, tuple(map(Reached.read, reached.split(","))), int(afterwards or 0))
