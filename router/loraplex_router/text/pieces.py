"""Tokenizes a long text piece by piece. Its tokens are those of the whole; its memory is that of a piece, for a
tokenizer takes more than a hundred bytes for each character.

Windows on the text overlap. What a tokenizer makes of a place depends on little of the text around it: on the words it
finds from left to right, and on which pairs of neighbours it merges. So two windows are joined where, away from the
edges of both, they have the same tokens in the same places, with words that begin in the same places. Where there is
no such agreement, or a word is longer than the overlap, the windows grow.
"""

from collections.abc import Iterator
from operator import ne
from typing import NamedTuple

import tokenizers

WINDOW = 2**15  # characters
LARGEST = 2**18
OVERLAPPING = 8  # this part of a window is in the next one, too
AGREED = 4  # tokens that two windows must have alike at least


class Token(NamedTuple):
    """One token, and the part of the text that became it: characters [start, stop)."""

    id: int
    start: int
    stop: int
    begins_word: bool


class IndivisibleError(ValueError):
    """A part of the text that is too long to be tokenized at once has no place where it could be cut."""


def read_pieces(tokenizer: tokenizers.Tokenizer, text: str, window: int = WINDOW) -> Iterator[list[Token]]:
    """The text's tokens, in order, without those that the tokenizer adds to a text. Raises IndivisibleError."""
    largest = window * (LARGEST // WINDOW)
    in_words = isinstance(tokenizer.model, tokenizers.models.BPE)  # it merges neighbours, and sees no word as a whole
    begin, size, done = 0, window, 0  # of the window; `done` of its tokens are out already
    tokens = _encode(tokenizer, text, begin, size)
    while (end := begin + size) < len(text):
        following, next_size = _begin_of_next(tokens, end - size // OVERLAPPING), max(window, size // 2)
        others = _encode(tokenizer, text, following, next_size)
        if join := _join(tokens, others, following, end, in_words):
            yield tokens[done : join[0]]
            begin, size, tokens, done = following, next_size, others, join[1]
            continue
        size *= 2
        grown = _encode(tokenizer, text, begin, size)
        if size > largest or grown[: done + 1] != tokens[: done + 1]:
            raise IndivisibleError
        tokens = grown
    yield tokens[done:]


def _encode(tokenizer: tokenizers.Tokenizer, text: str, begin: int, size: int) -> list[Token]:
    """Without the interpreter's lock: `encode` would keep it."""
    (found,) = tokenizer.encode_batch([text[begin : begin + size]], add_special_tokens=False)
    words = found.word_ids
    begins = map(ne, words, [None, *words[:-1]])
    return [
        Token(token, begin + start, begin + stop, new)
        for token, (start, stop), new in zip(found.ids, found.offsets, begins, strict=True)
    ]


def _begin_of_next(tokens: list[Token], least: int) -> int:
    """Where a token begins at or after `least`: soon a word, if there is one."""
    late = [token for token in tokens if token.start >= least]
    words = [token for token in late[: len(late) // OVERLAPPING] if token.begins_word]
    return next((token.start for token in words or late), least)


def _join(left: list[Token], right: list[Token], begin: int, end: int, in_words: bool) -> tuple[int, int] | None:
    """The numbers of a token in each of two windows, of which one begins where the other ends, up to which the first
    holds and from which the second does; None if they do not agree. It begins a word, unless it may be `in_words`."""
    margin = (end - begin) // 4
    inner = range(begin + margin, end - margin)
    first, second = ([at for at, token in enumerate(tokens) if token.start in inner] for tokens in (left, right))
    if len(first) < AGREED or [left[at] for at in first] != [right[at] for at in second]:
        return None
    pairs = list(zip(first, second, strict=True))
    return next((pair for pair in pairs if left[pair[0]].begins_word), pairs[0] if in_words else None)
