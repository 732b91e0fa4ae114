"""What a batch's attention is cut into: plain numbers, made once for all layers whose heads and window are the same.

A tile is some tokens of one chunk, with all query heads that share a KV head, over a run of positions. Chunks of a few
tokens make too few tiles to keep a GPU busy; the positions that they see are split, and the results combined. Where
they are split depends on nothing but the position, so that no sequence's result depends on its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from loraplex_shard.shapes.batch import Batch
from loraplex_shard.shapes.heads import Heads

SHORT, LONG = 16, 64  # rows of a tile, each a token's query head; tensor cores take no fewer than 16
SPLIT = 512  # positions for one tile, if it is a short one


@dataclass(frozen=True, slots=True)
class Tiles:
    """All int64. A tile is (chunk, first token, tokens, position of the first, [first, stop) of the positions, place of
    its partial results or -1); a split token (token, place of its first partial result, from one to the next, count).
    """

    short: torch.Tensor  # [tiles, 7], of at most SHORT rows
    long: torch.Tensor  # [tiles, 7], of at most `rows` rows
    rows: int  # a power of 2
    split: torch.Tensor  # [split tokens, 4]
    partials: int  # results of one token and all heads, over some positions


def make_tiles(batch: Batch, heads: Heads, dtype: torch.dtype, device: torch.device) -> Tiles:
    """The tiles of a batch, in the order of its tokens, for queries of this dtype."""
    group = heads.query // heads.kv
    # Products in float32 have no tensor cores, and the registers do not hold many rows of them.
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
    """[first, stop) split at the multiples of SPLIT."""
    cuts = [first, *range((first // SPLIT + 1) * SPLIT, stop, SPLIT), stop]
    return list(pairwise(cuts))
