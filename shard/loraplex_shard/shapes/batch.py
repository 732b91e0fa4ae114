"""The tensors of one step, as the decoder reads them. Knows nothing about sequences, sampling or gRPC."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_shard.shapes.adapter import AdapterWeights

Ints = NDArray[np.int64]


class Segment(NamedTuple):
    """A run of tokens of the batch that use the same adapter. Tokens that use the base model are not in a segment."""

    start: int
    stop: int
    adapter: AdapterWeights


@dataclass(frozen=True, slots=True)
class Batch:
    """The chunks of one step, one after the other. Lengths are in tokens; all tensors are on the model's device.

    Chunk i is the tokens [starts[i], starts[i + 1]) of the batch. After the step, its sequence has context_lengths[i]
    positions in the cache, and the chunk is the last of them. The sequence is in row rows[i]: position p is in block
    block_tables[rows[i], p // block_size].
    """

    token_ids: torch.Tensor  # [tokens] int64
    positions: torch.Tensor  # [tokens] int64: positions in the token's own sequence
    cache_indices: torch.Tensor  # [tokens] int64: where keys and values are written, block * block_size + offset
    starts: Ints  # [chunks + 1], on the host, as are the next two
    context_lengths: Ints  # [chunks]
    rows: Ints  # [chunks]
    block_tables: torch.Tensor  # [rows, blocks of the longest sequence] int32, undefined behind its end
    segments: tuple[Segment, ...]
