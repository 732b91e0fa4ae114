"""Cuts the attention of a batch into tiles. The tiles are plain numbers, made once for all layers with the same heads
and window.

A tile is some tokens of one chunk, with all query heads that share a KV head, over a range of positions. Chunks of few
tokens make too few tiles to keep a GPU busy, so the positions that they see are split, and the results combined. Where
they are split depends only on the position, so that a sequence's result does not depend on its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from loraplex_shard.shapes.batch import Batch
from loraplex_shard.shapes.heads import Heads

SHORT, LONG = 16, 64  # rows per tile; a row is one query head of a token. Tensor cores need at least 16
SPLIT = 512  # positions per short tile


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a batch; all tensors are int64.

    A tile is (chunk, first token, tokens, position of the first token, first position that it sees, stop of these
    positions, place of its partial results or -1). A split token is (token, place of its first partial result, distance
    to its next partial result, number of partial results).
    """

    short: torch.Tensor  # [tiles, 7]: tiles of at most SHORT rows
    long: torch.Tensor  # [tiles, 7]: tiles of at most `rows` rows
    rows: int  # a power of 2
    split: torch.Tensor  # [split tokens, 4]
    partials: int  # number of partial results; each is of one token and all heads, over some of its positions


def make_tiles(batch: Batch, heads: Heads, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Makes the tiles of a batch, in the order of its tokens, for queries of this dtype."""
    group = heads.query // heads.kv
    # Products in float32 do not use tensor cores, and the registers do not hold many rows of them.
    rows = max(SHORT if dtype == torch.float32 else LONG, 1 << (group - 1).bit_length())
    short: list[Sequence[int]] = []
    long: list[Sequence[int]] = []
    split: list[Sequence[int]] = []
    partials = 0
    for chunk, ((start, stop), context) in enumerate(zip(pairwise(batch.starts), batch.context_lengths, strict=True)):
        tokens, before = stop - start, context - (stop - start)
        if tokens * group > SHORT:
            for first in range(0, tokens, rows // group):
                count = min(tokens - first, rows // group)
                seen = _first_seen(before + first, heads), before + first + count
                long.append((chunk, start + first, count, before + first, *seen, -1))
            continue
        runs = _runs(_first_seen(before, heads), context)
        for number, run in enumerate(runs):
            place = partials + number * tokens if len(runs) > 1 else -1
            short.append((chunk, start, tokens, before, *run, place))
        if len(runs) > 1:
            split += [(start + token, partials + token, tokens, len(runs)) for token in range(tokens)]
            partials += len(runs) * tokens
    short_tiles, long_tiles, split_tokens = (
        torch.tensor(each, dtype=torch.int64, device=device) for each in (short, long, split)
    )
    return Tiles(short_tiles, long_tiles, rows, split_tokens, partials)


def _first_seen(position: int, heads: Heads) -> int:
    return 0 if heads.window is None else max(0, position - heads.window + 1)


def _runs(first: int, stop: int) -> list[tuple[int, int]]:
    """Splits [first, stop) at the multiples of SPLIT."""
    cuts = [first, *range((first // SPLIT + 1) * SPLIT, stop, SPLIT), stop]
    return list(pairwise(cuts))
