"""Attention of a step's tokens over the paged cache, prefill chunks and decodes of many sequences in one call.

What depends on the batch alone (which cache positions to read, masks) is prepared once per step, not per layer.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from loraplex_shard.batch import Batch

SMALLEST_DECODE_WIDTH = 8  # blocks: decodes over fewer are computed together


@dataclass(frozen=True, slots=True)
class ChunkReads:
    """What one chunk of several tokens attends to."""

    start: int  # its tokens in the batch
    stop: int
    blocks: torch.Tensor  # [n] int64
    positions: int  # read from these blocks
    mask: torch.Tensor | None  # [tokens, positions], 0 or -inf, in the model's dtype; None: plainly causal


@dataclass(frozen=True, slots=True)
class DecodeReads:
    """What chunks of one token attend to, for sequences of like length: padded to the longest of them."""

    tokens: torch.Tensor  # [decodes] int64, in the batch
    blocks: torch.Tensor  # [decodes, n] int64, padded with blocks of the same sequence
    mask: torch.Tensor  # [decodes, 1, 1, n * block_size], 0 or -inf, in the model's dtype


@dataclass(frozen=True, slots=True)
class AttentionReads:
    """All that a step's tokens attend to."""

    chunks: tuple[ChunkReads, ...]
    decodes: tuple[DecodeReads, ...]


def prepare_reads(batch: Batch, block_size: int, window: int | None, dtype: torch.dtype) -> AttentionReads:
    """A token attends to itself and the positions before it, the last `window` of them if there is one."""
    chunks = []
    decodes: dict[int, list[int]] = defaultdict(list)
    for chunk, (start, stop) in enumerate(pairwise(batch.starts)):
        if stop - start > 1:
            chunks.append(_chunk_reads(batch, chunk, block_size, window, dtype))
        else:
            context = min(batch.context_lengths[chunk], window or batch.context_lengths[chunk])
            width = max(-(-context // block_size), SMALLEST_DECODE_WIDTH)
            decodes[(width - 1).bit_length()].append(chunk)
    return AttentionReads(
        tuple(chunks), tuple(_decode_reads(batch, group, block_size, window, dtype) for group in decodes.values())
    )


def paged_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, reads: AttentionReads
) -> torch.Tensor:
    """Softmax attention with scale 1 / sqrt(head_dim): [tokens, heads, head_dim], like query.

    keys and values are one layer's cache [num_blocks, block_size, kv_heads, head_dim], which already holds the
    step's own tokens; heads is a multiple of kv_heads, and adjacent query heads share a KV head.
    """
    tokens, heads, head_dim = query.shape
    kv_heads = keys.shape[2]
    query = query.view(tokens, kv_heads, heads // kv_heads, head_dim)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for chunk in reads.chunks:
        out[chunk.start : chunk.stop] = _attend_chunk(query[chunk.start : chunk.stop], keys, values, chunk)
    for decode in reads.decodes:
        out[decode.tokens] = _attend_decodes(query[decode.tokens], keys, values, decode)
    return out.view(tokens, heads, head_dim)


def _chunk_reads(batch: Batch, chunk: int, block_size: int, window: int | None, dtype: torch.dtype) -> ChunkReads:
    start, stop = batch.starts[chunk], batch.starts[chunk + 1]
    context = batch.context_lengths[chunk]
    computed = context - (stop - start)
    first_block = _first_block(computed, block_size, window)
    blocks = batch.block_tables[chunk, first_block : -(-context // block_size)]
    positions = torch.arange(first_block * block_size, context, device=blocks.device)
    plain = computed == 0 and (window is None or window >= context)
    mask = None if plain else _mask(batch.positions[start:stop, None], positions, window, dtype)
    return ChunkReads(start, stop, blocks, positions.shape[0], mask)


def _decode_reads(
    batch: Batch, chunks: list[int], block_size: int, window: int | None, dtype: torch.dtype
) -> DecodeReads:
    device = batch.positions.device
    position = [batch.context_lengths[chunk] - 1 for chunk in chunks]
    first = [_first_block(p, block_size, window) for p in position]
    last = [p // block_size for p in position]
    width = 1 + max(stop - start for start, stop in zip(first, last, strict=True))
    tokens = torch.tensor([batch.starts[chunk] for chunk in chunks], device=device)
    columns = torch.tensor(first, device=device)[:, None] + torch.arange(width, device=device)  # [decodes, n]
    rows = torch.tensor(chunks, device=device)[:, None]
    blocks = batch.block_tables[rows, columns.minimum(torch.tensor(last, device=device)[:, None])]
    positions = (columns * block_size)[:, :, None] + torch.arange(block_size, device=device)
    mask = _mask(batch.positions[tokens, None], positions.flatten(1), window, dtype)
    return DecodeReads(tokens, blocks, mask[:, None, None])


def _first_block(position: int, block_size: int, window: int | None) -> int:
    """The first block that the token at `position` sees."""
    return 0 if window is None else max(0, position - window + 1) // block_size


def _mask(position: torch.Tensor, keys: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """0 where the token at `position` sees the key at position `keys`, else -inf; the two broadcast."""
    hidden = keys > position
    if window is not None:
        hidden |= keys <= position - window
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _attend_chunk(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: ChunkReads) -> torch.Tensor:
    """query [tokens, kv_heads, group, head_dim]; KV heads take the place of SDPA's batch, groups that of its heads."""
    group = query.shape[2]
    key, value = (
        cache[chunk.blocks].flatten(0, 1)[: chunk.positions].transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
        for cache in (keys, values)
    )
    out = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3), key, value, attn_mask=chunk.mask, is_causal=chunk.mask is None
    )
    return out.permute(2, 0, 1, 3)


def _attend_decodes(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, decodes: DecodeReads
) -> torch.Tensor:
    """query [decodes, kv_heads, group, head_dim]; the group takes the place of SDPA's query positions."""
    key, value = (cache[decodes.blocks].flatten(1, 2).transpose(1, 2) for cache in (keys, values))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=decodes.mask)
