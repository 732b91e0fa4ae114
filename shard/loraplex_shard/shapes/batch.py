"""The tensors of one step, as the decoder reads them. Knows nothing of sequences, sampling or gRPC."""

from dataclasses import dataclass

import torch

from loraplex_shard.shapes.adapter import AdapterWeights


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of the batch that use one adapter. Tokens of the base model are in no segment."""

    start: int
    stop: int
    adapter: AdapterWeights


@dataclass(frozen=True, slots=True)
class Batch:
    """The chunks of one step, one after the other. Lengths in tokens; all tensors on the model's device.

    Chunk i is the tokens [starts[i], starts[i + 1]) of the batch. After the step its sequence has
    context_lengths[i] positions in the cache, of which the chunk is the last ones; position p lies in block
    block_tables[i, p // block_size].
    """

    token_ids: torch.Tensor  # [tokens] int64
    positions: torch.Tensor  # [tokens] int64, in the token's own sequence
    cache_indices: torch.Tensor  # [tokens] int64: block * block_size + offset, where keys and values are written
    starts: tuple[int, ...]  # chunks + 1
    context_lengths: tuple[int, ...]  # chunks
    block_tables: torch.Tensor  # [chunks, blocks of the longest] int64, padded with 0
    segments: tuple[Segment, ...]
