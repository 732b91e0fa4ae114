"""Batches of chunks over shuffled blocks, on the device."""

from dataclasses import replace

import torch

from loraplex_shard.shapes.batch import Batch, Segment
from tests.shard.operations import BLOCK_SIZE, paged_batch


def batch_of(
    chunks: list[tuple[int, int]], device: torch.device, first_block: int = 0, segments: tuple[Segment, ...] = ()
) -> tuple[Batch, int]:
    """The batch, and the number of blocks, which begin at `first_block`. A chunk is (positions computed before,
    tokens)."""
    batch, num_blocks = paged_batch(chunks, seed=0)
    moved = replace(
        batch,
        token_ids=batch.token_ids.to(device),
        positions=batch.positions.to(device),
        cache_indices=(batch.cache_indices + first_block * BLOCK_SIZE).to(device),
        block_tables=(batch.block_tables + first_block).to(device),
        segments=segments,
    )
    return moved, num_blocks
