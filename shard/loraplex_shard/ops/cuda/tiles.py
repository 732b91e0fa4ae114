"""Cuts the attention of a batch into tiles. The tiles are plain numbers, made once for all layers with the same heads
and window.

A tile is some tokens of one chunk, with all query heads that share a KV head, over a range of positions. Chunks of few
tokens make too few tiles to keep a GPU busy, so the positions that they see are split, and the results combined. Where
they are split depends only on the position, so that a sequence's result does not depend on its neighbours.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_shard.ops.cuda.worklists import Worklist, numbered
from loraplex_shard.shapes.batch import Batch, Inputs
from loraplex_shard.shapes.heads import Heads

SHORT, LONG = 16, 64  # rows per tile; a row is one query head of a token. Tensor cores need at least 16
SPLIT = 512  # positions per short tile


Ints = NDArray[np.int64]
Entries = NDArray[np.int32]

# No tiles, and no split tokens.
NONE: Entries = np.empty((0, 7), np.int32)
NO_SPLITS: Entries = np.empty((0, 4), np.int32)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a batch, int32.

    A tile is (row of the block tables, first token, tokens, position of the first token, first position that it sees,
    stop of these positions, place of its partial results or -1). A split token is (token, place of its first partial
    result, distance to its next partial result, number of partial results).
    """

    short: Worklist  # tiles of at most SHORT rows
    long: Worklist  # tiles of at most `rows` rows
    rows: int  # a power of 2
    split: Worklist  # split tokens
    partials: int  # room for partial results; each is of one token and all heads, over some of its positions


@dataclass(frozen=True, slots=True)
class Cuts:
    """The entries of a batch's tiles, on the host."""

    short: Entries
    split: Entries
    partials: int
    long: Entries
    rows: int  # of a long tile, a power of 2


def make_tiles(batch: Batch, heads: Heads, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Makes the tiles of a batch, in the order of its tokens, for queries of this dtype."""
    cuts = cut_batch(batch, heads, dtype)
    short, long, split = (Worklist.of(entries, device) for entries in (cuts.short, cuts.long, cuts.split))
    return Tiles(short, long, cuts.rows, split, cuts.partials)


def cut_batch(batch: Batch | Inputs, heads: Heads, dtype: torch.dtype) -> Cuts:
    """The entries of these tiles."""
    return cut(batch.rows, batch.starts, batch.context_lengths, heads, rows_of_long_tiles(heads, dtype))


def rows_of_long_tiles(heads: Heads, dtype: torch.dtype) -> int:
    """The number of rows of a long tile, for queries of this dtype."""
    # Products in float32 do not use tensor cores, and the registers do not hold many rows of them.
    return max(SHORT if dtype == torch.float32 else LONG, 1 << (heads.query // heads.kv - 1).bit_length())


def cut(table_rows: Ints, starts: Ints, contexts: Ints, heads: Heads, rows: int) -> Cuts:
    """Cuts chunks into tiles: chunk i begins at token starts[i] of the batch, its sequence has row table_rows[i] of the
    block tables, and contexts[i] positions. Long tiles have at most `rows` rows."""
    group, tokens = heads.query // heads.kv, starts[1:] - starts[:-1]
    # Of each chunk (row, first token, tokens, position of the first token, first position that it sees, stop).
    chunks = np.empty((len(tokens), 6), np.int64)
    chunks[:, 0], chunks[:, 1], chunks[:, 2] = table_rows, starts[:-1], tokens
    chunks[:, 3], chunks[:, 4], chunks[:, 5] = contexts - tokens, 0, contexts
    if heads.window is not None:
        np.maximum(0, chunks[:, 3] - (heads.window - 1), out=chunks[:, 4])
    is_short = tokens * group <= SHORT
    if is_short.all():
        return Cuts(*_cut_short(chunks), NONE, rows)
    return Cuts(*_cut_short(chunks[is_short]), _cut_long(chunks[~is_short], heads.window, rows // group), rows)


def _cut_long(chunks: Ints, window: int | None, tokens: int) -> Entries:
    """Tiles of at most so many tokens."""
    counts = -(-chunks[:, 2] // tokens)
    tiles, first = np.repeat(chunks, counts, axis=0), numbered(counts) * tokens
    tiles[:, 1] += first
    tiles[:, 2] = np.minimum(tiles[:, 2] - first, tokens)
    tiles[:, 3] += first
    tiles[:, 4] = 0 if window is None else np.maximum(0, tiles[:, 3] - window + 1)
    tiles[:, 5] = tiles[:, 3] + tiles[:, 2]
    return _with_places(tiles, -1)


def _cut_short(chunks: Ints) -> tuple[Entries, Entries, int]:
    """Tiles of SPLIT positions, the split tokens, and how many partial results they have."""
    firsts = chunks[:, 4] // SPLIT
    runs = -(-chunks[:, 5] // SPLIT) - firsts
    is_split = runs > 1
    if not is_split.any():
        return _with_places(chunks, -1), NO_SPLITS, 0
    tokens = chunks[:, 2]
    partials = np.where(is_split, runs * tokens, 0)
    ends = np.cumsum(partials)
    tiles, number = np.repeat(chunks, runs, axis=0), numbered(runs)
    begins = (np.repeat(firsts, runs) + number) * SPLIT
    tiles[:, 4] = np.maximum(tiles[:, 4], begins)
    tiles[:, 5] = np.minimum(tiles[:, 5], begins + SPLIT)
    places = np.where(np.repeat(is_split, runs), np.repeat(ends - partials, runs) + number * tiles[:, 2], -1)

    # Of each split chunk (first token, place of its first partial result, tokens, runs): an entry for each token.
    split = np.stack((chunks[:, 1], ends - partials, tokens, runs), axis=1)[is_split]
    token = numbered(split[:, 2])
    split = np.repeat(split, split[:, 2], axis=0)
    split[:, 0] += token
    split[:, 1] += token
    return _with_places(tiles, places), split.astype(np.int32), int(ends[-1])


def _with_places(tiles: Ints, places: Ints | int) -> Entries:
    entries = np.empty((len(tiles), 7), np.int32)
    entries[:, :6], entries[:, 6] = tiles, places
    return entries
