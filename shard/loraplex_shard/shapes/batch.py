"""What a step computes: as a model is given it, on the host, and as layers read it, on the device."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_shard.device.copies import to_device
from loraplex_shard.sampling.draws import Draws
from loraplex_shard.shapes.adapter import AdapterWeights

Ints = NDArray[np.int64]

NONE: Ints = np.zeros(0, np.int64)


class Segment(NamedTuple):
    """A run of tokens of the batch that use the same adapter. Tokens that use the base model are not in a segment."""

    start: int
    stop: int
    adapter: AdapterWeights


@dataclass(frozen=True, slots=True)
class Inputs:
    """The chunks of one step, one after the other, as a model is given them.

    Token i of the batch is the one at positions[i] of the sequence in row token_rows[i]. The last row of `tokens` and
    of `block_tables` is nobody's: recorded passes read and write there what is not the step's own.
    """

    token_rows: Ints  # [tokens]
    positions: Ints  # [tokens]
    cache_indices: Ints  # [tokens]
    starts: Ints  # these and what follows: see Batch
    context_lengths: Ints
    rows: Ints
    tokens: torch.Tensor  # [rows, positions] int32, on the device
    block_tables: torch.Tensor
    segments: tuple[Segment, ...]
    # Entries of the flattened block tables that are new with the step, and what is to be written there.
    new_places: Ints = field(default_factory=lambda: NONE)
    new_blocks: Ints = field(default_factory=lambda: NONE)
    draws: Draws | None = None  # if a token is sampled after each token of the batch: by what

    def __len__(self) -> int:
        return len(self.positions)

    def with_blocks_written(self) -> "Inputs":
        """The same, after the new blocks were written to the block tables."""
        places, blocks = to_device((self.new_places, self.new_blocks), self.tokens.device)
        self.block_tables.view(-1)[places] = blocks.int()
        return replace(self, new_places=NONE, new_blocks=NONE)

    def batch(self) -> "Batch":
        """The same on the device, with one copy. Writes the new blocks."""
        columns = self.token_rows, self.positions, self.cache_indices, self.new_places, self.new_blocks
        token_rows, positions, cache_indices, places, blocks = to_device(columns, self.tokens.device)
        if len(self.new_places):
            self.block_tables.view(-1)[places] = blocks.int()
        return Batch(
            self.tokens[token_rows, positions].long(),
            positions,
            cache_indices,
            self.starts,
            self.context_lengths,
            self.rows,
            self.block_tables,
            self.segments,
        )


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
