"""Tokenizes a long text piece by piece. Its tokens are those of the whole; its memory is that of a piece, for a
tokenizer takes more than a hundred bytes for each character.

Windows on the text overlap. What a tokenizer makes of a place depends on little of the text around it: on the words it
finds from left to right, and on which pairs of neighbours it merges. So two windows are joined where, away from the
edges of both, they have the same tokens in the same places, with words that begin in the same places. Where there is
no such agreement, or a word is longer than the overlap, the windows grow.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import tokenizers

WINDOW = 2**13  # characters
LARGEST = 2**18
OVERLAPPING = 8  # this part of a window is in the next one, too
AGREED = 4  # tokens that two windows must have alike at least


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a text, from the character `begin` on."""

    begin: int
    ids: list[int]
    places: list[tuple[int, int]]  # the characters [start, stop) that became each one, counted from `begin`

    def flat_places(self) -> "array[int]":
        return array("I", chain.from_iterable(self.places))


class IndivisibleError(ValueError):
    """A part of the text that is too long to be tokenized at once has no place where it could be cut."""


def read_pieces(tokenizer: tokenizers.Tokenizer, text: str, window: int = WINDOW) -> Iterator[Piece]:
    """The text's tokens, in order, without those that the tokenizer adds to a text. Raises IndivisibleError."""
    largest = window * (LARGEST // WINDOW)
    in_words = isinstance(tokenizer.model, tokenizers.models.BPE)  # it merges neighbours, and sees no word as a whole
    size, done = window, 0  # done: how many of the window's tokens are out already
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
    """A part of the text, and its tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, text: str, begin: int, size: int) -> None:
        # Without the interpreter's lock: `encode` would keep it.
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
        """The number of the first token that begins at or after this character of the text."""
        return bisect_left(self._places, (place - self.begin, 0))

    def rows(self, first: int, behind: int) -> list[tuple[int, int, int, bool]]:
        """All that is known of some tokens."""
        return [
            (self.ids[at], self.begin + start, self.begin + stop, self.begins_word(at))
            for at, (start, stop) in enumerate(self._places[first:behind], first)
        ]

    def begin_of_next(self, least: int) -> int:
        """Where a token begins at or after `least`: soon a word, if there is one."""
        first, behind = self.first_at(least), len(self.ids)
        soon = range(first, first + (behind - first) // OVERLAPPING)
        at = next((at for at in soon if self.begins_word(at)), first)
        return self.begin + self._places[at][0] if at < behind else least


def _join(left: _Window, right: _Window, end: int, in_words: bool) -> tuple[int, int] | None:
    """The numbers of a token in each of two windows, of which one begins where the other ends, up to which the first
    holds and from which the second does; None if they do not agree. It begins a word, unless it may be `in_words`."""
    margin = (end - right.begin) // 4
    inner = right.begin + margin, end - margin
    first, second = left.first_at(inner[0]), right.first_at(inner[0])
    rows = left.rows(first, left.first_at(inner[1]))
    if len(rows) < AGREED or rows != right.rows(second, right.first_at(inner[1])):
        return None
    words = (place for place, row in enumerate(rows) if row[-1])
    place = next(words, 0 if in_words else None)
    return None if place is None else (first + place, second + place)
