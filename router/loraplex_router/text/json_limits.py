"""Reads clients' JSON, and limits its size and depth before parsing.

A parser holds the GIL until it is done, and turns one byte into up to a hundred: the JSON refused here would block all
streams, or fill the memory.
"""

import asyncio
import re
from itertools import accumulate
from typing import Any

from pydantic_core import from_json

MAX_DEPTH = 128  # nested lists and objects: serde_json's limit, as in other servers
MAX_ELEMENTS = 2**18  # commas: a quarter of a million token ids
MAX_NODES = 2**15  # lists, objects and object keys
SLICE = 2**16  # bytes scanned without a pause
LONG = 2**14  # bytes of a body: reading more delays the event loop more than handing it to a thread

_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_BRACKETS = b"[]{}"
_NO_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class JsonStructure:
    """Counts the structure outside strings, in a text that arrives in pieces."""

    def __init__(self) -> None:
        self._in_string = False
        self._rest = b""  # a trailing backslash, before its character has arrived
        self._elements = self._nodes = self._depth = 0

    def feed(self, piece: bytes) -> None:
        """Raises ValueError once a limit is exceeded. The message can follow the name of what was read."""
        piece = _ESCAPED.sub(b"", self._rest + piece)
        piece, self._rest = (piece[:-1], piece[-1:]) if piece.endswith(b"\\") else (piece, b"")
        parts = piece.split(b'"')
        outside = b" ".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        brackets = outside.translate(None, _NO_BRACKETS)
        depths = list(accumulate(map(_STEPS.__getitem__, brackets), initial=self._depth))
        self._depth = depths[-1]
        self._nodes += brackets.count(b"[") + brackets.count(b"{") + outside.count(b":")
        self._elements += outside.count(b",")
        if max(depths) > MAX_DEPTH:
            raise ValueError(f"is nested too deeply: at most {MAX_DEPTH} levels of lists and objects")
        if self._nodes > MAX_NODES or self._elements > MAX_ELEMENTS:
            raise ValueError(
                f"is too large: at most {MAX_ELEMENTS} values, and {MAX_NODES} lists, objects and object keys"
            )


def check_structure(text: bytes) -> None:
    """Raises ValueError if the JSON text exceeds a limit. Other threads run meanwhile."""
    structure = JsonStructure()
    for start in range(0, len(text), SLICE):
        structure.feed(text[start : start + SLICE])


async def parse_body(body: bytes) -> Any:
    """The value of a whole body; other tasks run while a long one is read. Raises ValueError as `parse` does."""
    return await asyncio.to_thread(parse, body) if len(body) > LONG else parse(body)


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ValueError, with a message that can follow the name of what was read. Also refuses lone surrogates, which the
    standard library accepts but which are not characters and cannot be encoded.
    """
    encoded = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    check_structure(encoded)
    try:
        return from_json(encoded)
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from error
