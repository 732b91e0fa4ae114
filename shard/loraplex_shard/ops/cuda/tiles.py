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
from loraplex_shard.shapes.batch import Batch
from loraplex_shard.shapes.heads import Heads

SHORT, LONG = 16, 64  # rows per tile; a row is one query head of a token. Tensor cores need at least 16
SPLIT = 512  # positions per short tile


Ints = NDArray[np.int32]


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

    short: Ints
    long: Ints
    rows: int
    split: Ints
    partials: int


def make_tiles(batch: Batch, heads: Heads, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Makes the tiles of a batch, in the order of its tokens, for queries of this dtype."""
    cuts = cut_batch(batch, heads, dtype)
    short, long, split = (Worklist.of(entries, device) for entries in (cuts.short, cuts.long, cuts.split))
    return Tiles(short, long, cuts.rows, split, cuts.partials)


def cut_batch(batch: Batch, heads: Heads, dtype: torch.dtype) -> Cuts:
    """The entries of these tiles."""
    cuts = cut(np.array(batch.starts), np.array(batch.context_lengths), heads, rows_of_long_tiles(heads, dtype))
    for tiles in (cuts.short, cuts.long):
        tiles[:, 0] = np.array(batch.rows)[tiles[:, 0]]
    return cuts


def rows_of_long_tiles(heads: Heads, dtype: torch.dtype) -> int:
    """The number of rows of a long tile, for queries of this dtype."""
    # Products in float32 do not use tensor cores, and the registers do not hold many rows of them.
    return max(SHORT if dtype == torch.float32 else LONG, 1 << (heads.query // heads.kv - 1).bit_length())


def cut(starts: NDArray[np.int64], contexts: NDArray[np.int64], heads: Heads, rows: int) -> Cuts:
    """Cuts chunks, whose tokens begin at these places in the batch and whose sequences have these lengths, into tiles.
    Long tiles have at most this number of rows. In each tile, its chunk is in place of the row of the block tables."""
    group, tokens = heads.query // heads.kv, np.diff(starts)
    before = contexts - tokens

    def first_seen(positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.zeros_like(positions) if heads.window is None else np.maximum(0, positions - heads.window + 1)

    chunks = np.flatnonzero(tokens * group > SHORT)
    counts = -(-tokens[chunks] // (rows // group))
    chunk, first = np.repeat(chunks, counts), numbered(counts) * (rows // group)
    count, position = np.minimum(tokens[chunk] - first, rows // group), before[chunk] + first
    seen = first_seen(position), position + count
    long = _entries(chunk, starts[chunk] + first, count, position, *seen, np.full(len(chunk), -1))

    chunks = np.flatnonzero(tokens * group <= SHORT)
    low = first_seen(before[chunks])
    runs = -(-contexts[chunks] // SPLIT) - low // SPLIT
    is_split = runs > 1
    ends = np.cumsum(runs * tokens[chunks] * is_split)
    places = ends - runs * tokens[chunks]
    which, number = np.repeat(np.arange(len(chunks)), runs), numbered(runs)
    chunk, run = chunks[which], low[which] // SPLIT + number
    seen = np.maximum(low[which], run * SPLIT), np.minimum(contexts[chunk], (run + 1) * SPLIT)
    place = np.where(is_split[which], places[which] + number * tokens[chunk], -1)
    short = _entries(chunk, starts[chunk], tokens[chunk], before[chunk], *seen, place)

    chunk, places, runs = chunks[is_split], places[is_split], runs[is_split]
    which, token = np.repeat(np.arange(len(chunk)), tokens[chunk]), numbered(tokens[chunk])
    split = _entries(starts[chunk][which] + token, places[which] + token, tokens[chunk][which], runs[which])
    return Cuts(short, long, rows, split, int(ends[-1]) if len(ends) else 0)


def _entries(*columns: NDArray[np.int64]) -> Ints:
    return np.stack(columns, axis=1).astype(np.int32)
