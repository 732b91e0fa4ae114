"""What each row's sequence may sample next: grammar matchers, allowed and banned tokens, as masks over the vocabulary.

Masks are computed on a separate thread, in Rust, while the forward pass runs. A row's state follows from its
SequenceStart and the tokens sampled since. A matcher's error breaks only its own row. Exists only on rank 0, which
samples. Not thread-safe.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
import torch.nn.functional as F
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from loraplex_protos.shard_pb2 import SequenceStart
from loraplex_shard.device.copies import to_device
from loraplex_shard.sampling.bad_words import BadWords
from loraplex_shard.sampling.grammars import GrammarCompiler

logger = logging.getLogger(__name__)

WORD = 32  # bits of a mask that lie in one integer
COMPLETE = "NoExtension"  # llguidance's word for a match that cannot be extended and has not ended yet


@dataclass(frozen=True, slots=True)
class Ban:
    """Bans these tokens until the sequence, prompt included, has a given length, unless the grammar allows nothing
    else."""

    length: float
    token_ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Masks:
    """The masks of one step's constrained rows, possibly still being computed."""

    places: NDArray[np.int64]  # indices of these rows among the rows given to `begin`
    allowed: Future[NDArray[np.uint8]]  # [places, vocab / 8]: a bit for each token, the least significant one first

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy of the logits [n, vocab] with -inf where a token is not allowed; waits for the masks. Tokens beyond
        the masks are those of other rows' adapters."""
        index, packed = to_device([self.places, self.allowed.result()], logits.device)
        packed = F.pad(packed, (0, -(-logits.shape[1] // 8) - packed.shape[1]))
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        forbidden = (packed[:, :, None] >> shifts & 1 == 0).flatten(1)[:, : logits.shape[1]]
        return logits.index_copy(0, index, logits[index].masked_fill(forbidden, -torch.inf))


class Constraints:
    def __init__(self, grammars: GrammarCompiler, vocab_size: int) -> None:
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._matchers: dict[int, LLMatcher] = {}  # by row, as are the others
        self._compilers: dict[int, GrammarCompiler] = {}
        self._sizes: dict[int, int] = {}  # of rows whose adapters have another number of tokens than the model
        self._bans: dict[int, list[Ban]] = {}
        self._only: dict[int, NDArray[np.uint8]] = {}  # masks of allowed tokens
        self._bad_words: dict[int, BadWords] = {}
        self._broken: set[int] = set()  # rows whose matcher raised something
        self._executor = LLExecutor()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def clear(self) -> None:
        """Forgets all sequences."""
        self._matchers.clear()
        self._compilers.clear()
        self._sizes.clear()
        self._bans.clear()
        self._only.clear()
        self._bad_words.clear()
        self._broken.clear()

    def start(self, start: SequenceStart) -> None:
        """A sequence takes over its row. Fast, since its grammar is already compiled."""
        self._matchers.pop(start.row, None)
        self._bans.pop(start.row, None)
        self._only.pop(start.row, None)
        self._bad_words.pop(start.row, None)
        self._broken.discard(start.row)
        self._sizes.pop(start.row, None)
        if start.vocab_size:
            self._sizes[start.row] = start.vocab_size
        if start.HasField("grammar"):
            with self._alone(start.row):
                compiler = self._compilers[start.row] = self._grammars.of(start.grammar.adapter)
                matcher = compiler.matcher(start.grammar)
                matcher.consume_tokens(start.tokens[start.prompt_length :])
                self._matchers[start.row] = matcher
        least = start.prompt_length + start.min_new_tokens
        size = self._size(start.row)
        bans = [Ban(least, _below(size, start.end_token_ids)), Ban(inf, _below(size, start.unwanted_token_ids))]
        if any(len(ban.token_ids) for ban in bans):
            self._bans[start.row] = bans
        if start.allowed_token_ids:
            only = self._only[start.row] = np.zeros(size, np.uint8)
            only[_below(size, start.allowed_token_ids)] = 1
        words = [word.tokens for word in start.bad_words if max(word.tokens) < size]  # others are never sampled
        if words:
            self._bad_words[start.row] = BadWords(words, start.tokens[start.prompt_length :])

    def begin(self, rows: Sequence[int], lengths: Sequence[int]) -> Masks | None:
        """Starts computing what may follow in these rows, whose sequences have these lengths. None: anything, in all
        rows."""
        if not (self._matchers or self._only or self._bans or self._bad_words):
            return None
        matchers = [self._matchers.get(row) for row in rows]
        banned = [self._banned(row, length) for row, length in zip(rows, lengths, strict=True)]
        narrowed = [row in self._matchers or row in self._only or row in self._bad_words for row in rows]
        places = [place for place in range(len(rows)) if narrowed[place] or len(banned[place])]
        if not places:
            return None
        future = self._thread.submit(
            self._allowed,
            [(rows[place], matchers[place]) for place in places],
            [self._only.get(rows[place]) for place in places],
            [banned[place] for place in places],
        )
        return Masks(np.array(places), future)

    def follows(self, rows: Sequence[int]) -> bool:
        """Whether what some of these rows may sample depends on what they sample before, so that `accept` must know."""
        return any(row in self._matchers or row in self._bad_words for row in rows)

    def accept(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Accepts the tokens sampled after `begin`."""
        for row, token in zip(rows, tokens, strict=True):
            if row in self._matchers:
                with self._alone(row):
                    self._matchers[row].consume_token(token)
            if row in self._bad_words:
                self._bad_words[row].accept(token)

    def fast_forward(self, row: int, most: int, end: bool) -> list[int]:
        """Accepts and returns the tokens that the grammar forces in this row: at most `most`, and the end token only
        with `end`."""
        matcher = self._matchers.get(row)
        if matcher is None:
            return []
        tokens: list[int] = []
        with self._alone(row):
            tokens = self._compilers[row].fast_forward(matcher)[:most]
            matcher.consume_tokens(tokens)
            if end and matcher.stop_reason() == COMPLETE and len(tokens) < most:
                tokens.append(self._compilers[row].end_token_id)
        for token in tokens if row in self._bad_words else ():
            self._bad_words[row].accept(token)
        return tokens

    def failed(self, rows: Sequence[int]) -> NDArray[np.bool_]:
        """Which of these rows' grammars have failed: their last masks and tokens are invalid."""
        return np.array([row in self._broken or self._in_error(row) for row in rows], np.bool_)

    def _in_error(self, row: int) -> bool:
        return row in self._matchers and self._matchers[row].is_error()

    @contextmanager
    def _alone(self, row: int) -> Iterator[None]:
        """A context whose errors break this row."""
        try:
            yield
        except BaseException:  # a Rust panic is not an Exception
            logger.exception("a grammar cannot be enforced")
            self._matchers.pop(row, None)
            self._broken.add(row)

    def _banned(self, row: int, length: int) -> NDArray[np.int64]:
        bans = [ban.token_ids for ban in self._bans.get(row, ()) if length < ban.length]
        if row in self._bad_words:
            bans += self._bad_words[row].banned()
        return np.concatenate(bans) if bans else _array(())

    def _allowed(
        self,
        matchers: Sequence[tuple[int, LLMatcher | None]],
        only: Sequence[NDArray[np.uint8] | None],
        banned: Sequence[NDArray[np.int64]],
    ) -> NDArray[np.uint8]:
        """Packed masks of these rows, [matchers, the largest vocabulary of theirs / 8]."""
        sizes = [self._size(row) for row, _ in matchers]
        bits = np.zeros((len(matchers), max(sizes)), np.uint8)
        for size in set(sizes):
            places = [place for place, own in enumerate(sizes) if own == size]
            bits[places, :size] = self._masks([matchers[place] for place in places], size)
        for place, (row, matcher) in enumerate(matchers):
            if matcher is not None and np.count_nonzero(bits[place]) == 1:
                # There is no choice, and possibly a special token instead of its text.
                with self._alone(row):
                    for token in self._compilers[row].fast_forward(matcher)[:1]:
                        bits[place] = 0
                        bits[place, token] = 1
        for place, (mask, tokens) in enumerate(zip(only, banned, strict=True)):
            if mask is not None and (bits[place, : len(mask)] & mask).any():
                bits[place, : len(mask)] &= mask
            _ban(bits[place], tokens)
        return np.packbits(bits, axis=1, bitorder="little")

    def _masks(self, matchers: Sequence[tuple[int, LLMatcher | None]], size: int) -> NDArray[np.uint8]:
        """[matchers, size], of rows with so many tokens"""
        words = np.full((len(matchers), -(-size // WORD)), -1, np.int32)
        jobs = [(matcher, place) for place, (_, matcher) in enumerate(matchers) if matcher is not None]
        if jobs:
            try:
                fill_next_token_bitmask_par(self._executor, jobs, words)
            except BaseException:  # find out one by one which of them it was
                for matcher, place in jobs:
                    with self._alone(matchers[place][0]):
                        fill_next_token_bitmask(matcher, words, place)
        return np.unpackbits(words.view(np.uint8), axis=1, count=size, bitorder="little")

    def _size(self, row: int) -> int:
        return self._sizes.get(row, self._vocab_size)


def _below(size: int, tokens: Iterable[int]) -> NDArray[np.int64]:
    """The tokens that there are: others are never sampled."""
    ids = _array(tokens)
    return ids[ids < size]


def _ban(bits: NDArray[np.uint8], tokens: NDArray[np.int64]) -> None:
    """Clears the tokens' bits, unless no others would be left."""
    before = bits[tokens]
    bits[tokens] = 0
    if not bits.any():
        bits[tokens] = before


def _array(tokens: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(tokens, np.int64)
