"""Tokenizes a long text piece by piece. The tokens are those of the whole text, but the memory is that of a piece: a
tokenizer takes more than a hundred bytes per character.

The text is read in overlapping windows. A token depends on little of the text around it: on the words found from left
to right, and on which neighbours are merged. So two windows are joined where, away from both edges, they have the same
tokens in the same places, with words that begin in the same places. If there is no such agreement, or a word is longer
than the overlap, the windows grow.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import tokenizers

WINDOW = 2**13  # characters
LARGEST = 2**18
OVERLAPPING = 8  # one such part of a window overlaps the next one
AGREED = 4  # minimum number of tokens on which two windows must agree


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a text, starting at character `begin`."""

    begin: int
    ids: list[int]
    places: list[tuple[int, int]]  # the characters [start, stop) of each token, relative to `begin`

    def flat_places(self) -> "array[int]":
        return array("I", chain.from_iterable(self.places))


class IndivisibleError(ValueError):
    """A part of the text is too long to tokenize at once and cannot be split."""


def read_pieces(tokenizer: tokenizers.Tokenizer, text: str, window: int = WINDOW) -> Iterator[Piece]:
    """The text's tokens, in order, without added special tokens. Raises IndivisibleError."""
    largest = window * (LARGEST // WINDOW)
    in_words = isinstance(tokenizer.model, tokenizers.models.BPE)  # it merges, not matches whole words
    size, done = window, 0  # done: number of the window's tokens already returned
    here = _Window(tokenizer, text, 0, size)
    while (end := here.begin + size) < len(text):
        next_size = max(window, size // 2)
        following = _Window(tokenizer, text, here.begin_of_next(end - size // OVERLAPPING), next_size)
        if join := _join(here, following, end, in_words):
            yield here.piece(done, join[0])
            here, done, size = following, join[1], next_size
            continue
        size *= 2
        grown = _Window(tokenizer, text, here.begin, size)
        if size > largest or grown.rows(0, done + 1) != here.rows(0, done + 1):
            raise IndivisibleError
        here = grown
    yield here.piece(done, len(here.ids))


class _Window:
    """A part of the text with its tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, text: str, begin: int, size: int) -> None:
        # Releases the GIL; `encode` would hold it.
        (found,) = tokenizer.encode_batch([text[begin : begin + size]], add_special_tokens=False)
        self.begin = begin
        self.ids: list[int] = found.ids
        self._places: list[tuple[int, int]] = found.offsets
        self._words: list[int | None] = found.word_ids

    def piece(self, first: int, behind: int) -> Piece:
        return Piece(self.begin, self.ids[first:behind], self._places[first:behind])

    def begins_word(self, at: int) -> bool:
        return at == 0 or self._words[at] != self._words[at - 1]

    def first_at(self, place: int) -> int:
        """The index of the first token that begins at or after this character of the text."""
        return bisect_left(self._places, (place - self.begin, 0))

    def rows(self, first: int, behind: int) -> list[tuple[int, int, int, bool]]:
        """All data of these tokens, for comparison."""
        return [
            (self.ids[at], self.begin + start, self.begin + stop, self.begins_word(at))
            for at, (start, stop) in enumerate(self._places[first:behind], first)
        ]

    def begin_of_next(self, least: int) -> int:
        """The start of a token at or after `least`: of a word, if one begins soon."""
        first, behind = self.first_at(least), len(self.ids)
        soon = range(first, first + (behind - first) // OVERLAPPING)
        at = next((at for at in soon if self.begins_word(at)), first)
        return self.begin + self._places[at][0] if at < behind else least


def _join(left: _Window, right: _Window, end: int, in_words: bool) -> tuple[int, int] | None:
    """The indices, in two overlapping windows, of the token at which the second takes over from the first; None if they
    do not agree. The token begins a word, unless `in_words` allows others."""
    margin = (end - right.begin) // 4
    inner = right.begin + margin, end - margin
    first, second = left.first_at(inner[0]), right.first_at(inner[0])
    rows = left.rows(first, left.first_at(inner[1]))
    if len(rows) < AGREED or rows != right.rows(second, right.first_at(inner[1])):
        return None
    words = (place for place, row in enumerate(rows) if row[-1])
    place = next(words, 0 if in_words else None)
    return None if place is None else (first + place, second + place)
