"""Attention over the paged cache, in one launch for the chunks of few tokens and one for the others.

torch's `varlen_attn` takes block tables too, but only with blocks of 256 positions, and supports neither soft caps nor
int8. Here a program computes one tile (see tiles.py) for one KV head. It reads each key and value once and updates the
softmax as it goes (FlashAttention, arXiv 2205.14135). If a token's positions are split over several programs, a second
kernel combines their results.
"""

import torch
import triton
import triton.language as tl

from loraplex_shard.ops.cuda.tiles import SHORT, Tiles
from loraplex_shard.ops.cuda.worklists import multiprocessors
from loraplex_shard.shapes.batch import Batch
from loraplex_shard.shapes.cache import LayerCache
from loraplex_shard.shapes.heads import Heads

EVERYTHING = 1 << 30  # a window that hides nothing
KEY_BYTES = 64 * 256  # bytes of keys that a program reads at once
PROGRAMS = 4  # programs per multiprocessor, at most; each computes its share of the tiles
PARTIALS = 16  # partial results that are combined at once


def attention(
    qkv: torch.Tensor, heads: Heads, batch: Batch, tiles: Tiles, cache: LayerCache, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Implements Operations.attention. `tiles` are the tiles of the batch for these heads."""
    out = qkv.new_empty((len(qkv), heads.out_width))
    partials = qkv.new_empty((tiles.partials, heads.query, heads.value_dim), dtype=torch.float32)
    weights = partials.new_empty((tiles.partials, heads.query))
    lanes, value_lanes = (max(16, triton.next_power_of_2(dim)) for dim in (heads.dim, heads.value_dim))
    widest = max(lanes, value_lanes)
    group = heads.query // heads.kv
    most = triton.cdiv(PROGRAMS * multiprocessors(qkv.device), heads.kv)
    for part, rows in (tiles.short, SHORT), (tiles.long, tiles.rows):
        if part.room:
            _attention[(min(part.room, most), heads.kv)](
                qkv,
                qkv.shape[1],
                out,
                partials,
                weights,
                sinks,
                cache.keys,
                cache.values,
                cache.key_scales,
                cache.value_scales,
                batch.block_tables,
                batch.block_tables.shape[1],
                part.entries,
                part.count,
                heads.scale,
                heads.window or EVERYTHING,
                SOFT_CAP=heads.soft_cap,
                KV=heads.kv,
                GROUP=group,
                DIM=heads.dim,
                LANES=lanes,
                VALUE_DIM=heads.value_dim,
                VALUE_LANES=value_lanes,
                BLOCK_SIZE=cache.keys.shape[-1],
                ROWS=rows,
                POSITIONS=max(cache.keys.shape[-1], min(64, KEY_BYTES // (widest * qkv.itemsize))),
                num_warps=4 if rows * widest <= 64 * 64 else 8,
                num_stages=_stages(rows, cache),
            )
    if tiles.split.room:
        _combine[(tiles.split.room, heads.query)](
            partials,
            weights,
            sinks,
            tiles.split.entries,
            tiles.split.count,
            out,
            HEADS=heads.query,
            DIM=heads.value_dim,
            LANES=value_lanes,
            PARTIALS=PARTIALS,
        )
    return out


def _stages(rows: int, cache: LayerCache) -> int:
    """The number of pipeline stages. The load of the block table takes two of them, so with 5 stages the keys and
    values of two iterations are being loaded. Some GPUs lack the shared memory for that if a tile has many rows."""
    return 5 if rows == SHORT else 3


@triton.jit(do_not_specialize=["table_width", "window"])
def _attention(
    qkv,
    stride,
    out,
    partials,
    weights,
    sinks,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    table_width,
    tiles,
    tile_count,
    scale,
    window,
    SOFT_CAP: tl.constexpr,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    HEADS: tl.constexpr = KV * GROUP
    dtype = qkv.dtype.element_ty
    kv_head = tl.program_id(1)
    row, lane, value_lane = tl.arange(0, ROWS), tl.arange(0, LANES), tl.arange(0, VALUE_LANES)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    for number in range(tl.program_id(0), tl.load(tile_count), tl.num_programs(0)):
        tile = tiles + number * 7
        sequence, start, count = tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64), tl.load(tile + 2)
        position, first, stop, place = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6)
        real = (token < count)[:, None] & (lane < DIM)[None, :]
        query_place = (start + token) * stride + head * DIM
        query = tl.load(qkv + query_place[:, None] + lane[None, :], real, 0.0)
        own = position + token

        peak = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        if sinks is not None:
            whole = place < 0  # otherwise _combine adds the sink
            peak = tl.where(whole, tl.load(sinks + head), peak)
            total += tl.where(whole, 1.0, 0.0)
        sums = tl.zeros([ROWS, VALUE_LANES], tl.float32)
        for begin in range(first, stop, POSITIONS):
            seen = begin + tl.arange(0, POSITIONS)
            inside, offset = seen < stop, seen % BLOCK_SIZE
            block = tl.load(tables + sequence * table_width + seen // BLOCK_SIZE, inside, 0).to(tl.int64)
            cache_place = (block * BLOCK_SIZE + offset) * KV + kv_head
            key_place = cache_place[:, None] * DIM + lane[None, :]
            key = tl.load(keys + key_place, inside[:, None] & (lane < DIM)[None, :], 0.0)
            scores = tl.dot(query, tl.trans(key.to(dtype)), input_precision="ieee") * scale
            scale_place = (block * KV + kv_head) * BLOCK_SIZE + offset
            if key_scales is not None:
                scores *= tl.load(key_scales + scale_place, inside, 0.0)[None, :]
            if SOFT_CAP > 0:
                scores = SOFT_CAP * (2 * tl.sigmoid(2 / SOFT_CAP * scores) - 1)  # tanh
            visible = inside[None, :] & (seen[None, :] <= own[:, None]) & (seen[None, :] > own[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp(peak - higher)
            chances = tl.exp(scores - higher[:, None])
            total = total * shrink + tl.sum(chances, 1)
            value_place = cache_place[:, None] * VALUE_DIM + value_lane[None, :]
            value = tl.load(values + value_place, inside[:, None] & (value_lane < VALUE_DIM)[None, :], 0.0)
            if value_scales is not None:
                value_scale = tl.load(value_scales + scale_place, inside, 0.0)
                if dtype == tl.float16:  # a small probability times a small scale underflows in float16
                    value = value.to(tl.float32) * value_scale[:, None]
                else:
                    chances *= value_scale[None, :]
            sums = sums * shrink[:, None]
            sums = tl.dot(chances.to(dtype), value.to(dtype), sums, input_precision="ieee")
            peak = higher

        total = tl.where(total > 0, total, 1.0)  # it is 0 where a row saw nothing; such a row gets no weight
        result = sums / total[:, None]
        real = (token < count)[:, None] & (value_lane < VALUE_DIM)[None, :]
        if place < 0:
            to = (start + token) * HEADS + head
            tl.store(out + to[:, None] * VALUE_DIM + value_lane[None, :], result.to(dtype), real)
        else:
            to = (place.to(tl.int64) + token) * HEADS + head
            tl.store(partials + to[:, None] * VALUE_DIM + value_lane[None, :], result, real)
            tl.store(weights + to, peak + tl.log(total), token < count)


@triton.jit
def _combine(
    partials,
    weights,
    sinks,
    split,
    split_count,
    out,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Sums the partial results of one token and head, each weighted by its share of the softmax's denominator."""
    if tl.program_id(0) >= tl.load(split_count):
        return
    entry, head = split + tl.program_id(0) * 4, tl.program_id(1)
    token, place = tl.load(entry).to(tl.int64), tl.load(entry + 1).to(tl.int64)
    step, count = tl.load(entry + 2), tl.load(entry + 3)
    lane, each = tl.arange(0, LANES), tl.arange(0, PARTIALS)
    peak, total = -1e30, 0.0
    if sinks is not None:
        peak, total = tl.load(sinks + head), 1.0
    sums = tl.zeros([LANES], tl.float32)
    for first in range(0, count, PARTIALS):
        there = first + each < count
        at = (place + (first + each) * step) * HEADS + head
        weight = tl.load(weights + at, there, float("-inf"))
        part = tl.load(partials + at[:, None] * DIM + lane[None, :], there[:, None] & (lane < DIM)[None, :], 0.0)
        higher = tl.maximum(peak, tl.max(weight, 0))
        shrink, share = tl.exp(peak - higher), tl.exp(weight - higher)
        sums = sums * shrink + tl.sum(share[:, None] * part, 0)
        total = total * shrink + tl.sum(share, 0)
        peak = higher
    tl.store(out + (token * HEADS + head) * DIM + lane, (sums / total).to(out.dtype.element_ty), lane < DIM)
