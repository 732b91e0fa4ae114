"""Reads JSON that clients sent: how much is in it, and how deep, is known before anything is made of it.

A parser holds the interpreter until it is done, and makes up to a hundred bytes of one: what is refused here would
hold up all streams, or fill the memory.
"""

import asyncio
import re
from itertools import accumulate
from typing import Any

from pydantic_core import from_json

MAX_DEPTH = 128  # lists and objects in each other: serde_json's limit, which other servers have
MAX_ELEMENTS = 2**18  # commas: a quarter of a million token ids
MAX_NODES = 2**15  # lists and objects, and the names in objects
SLICE = 2**16  # bytes looked at in one go

_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_BRACKETS = b"[]{}"
_NO_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class JsonStructure:
    """Counts what is outside of strings in a text that comes in pieces."""

    def __init__(self) -> None:
        self._in_string = False
        self._rest = b""  # a backslash whose character is still to come
        self._elements = self._nodes = self._depth = 0

    def feed(self, piece: bytes) -> None:
        """Raises ValueError, with words that can follow the name of what was read, once it is too much."""
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
            raise ValueError(f"is nested too deeply: at most {MAX_DEPTH} lists and objects in each other")
        if self._nodes > MAX_NODES or self._elements > MAX_ELEMENTS:
            raise ValueError(
                f"holds too much: at most {MAX_ELEMENTS} values, and {MAX_NODES} lists, objects and names in them"
            )


async def parse_body(body: bytes) -> Any:
    """The value of a whole body. Others have their turn while it is looked at. Raises ValueError as `parse` does."""
    structure = JsonStructure()
    for start in range(0, len(body), SLICE):
        structure.feed(body[start : start + SLICE])
        if start:
            await asyncio.sleep(0)
    return _parse(body)


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError, with words that can follow the name of what was read, also where the standard library would not:
    half a surrogate pair is no character, and nothing that takes text takes it.
    """
    encoded = text.encode(errors="surrogatepass")
    JsonStructure().feed(encoded)
    return _parse(encoded)


def _parse(encoded: bytes) -> Any:
    try:
        return from_json(encoded)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
