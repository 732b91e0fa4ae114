"""Rotates queries and keys and writes keys and values to the paged cache: one program per token and head."""

import torch
import triton
import triton.language as tl

from loraplex_shard.ops.base import HeadNorms, Rotary
from loraplex_shard.ops.cuda.quantized import nearest
from loraplex_shard.shapes.batch import Batch
from loraplex_shard.shapes.cache import SCALED, LayerCache
from loraplex_shard.shapes.heads import Heads


def rotate_and_write(
    qkv: torch.Tensor, heads: Heads, norms: HeadNorms | None, rotary: Rotary | None, batch: Batch, cache: LayerCache
) -> None:
    """Implements Operations.rotate_and_write."""
    block_size = cache.keys.shape[-1]
    assert cache.keys.stride() == (heads.kv * heads.dim * block_size, heads.dim, 1, heads.kv * heads.dim), "CPU's form"
    _rotate_and_write[(len(qkv), heads.query + 2 * heads.kv)](
        qkv,
        None if norms is None else norms.weight,
        None if norms is None else norms.squares,
        0.0 if norms is None else norms.eps,
        batch.positions,
        None if rotary is None else rotary.cos,
        None if rotary is None else rotary.sin,
        None if rotary is None else rotary.query_scale,
        batch.cache_indices,
        cache.keys,
        cache.values,
        cache.key_scales,
        cache.value_scales,
        QUERY=heads.query,
        KV=heads.kv,
        DIM=heads.dim,
        VALUE_DIM=heads.value_dim,
        ROTATED=0 if rotary is None else rotary.cos.shape[1],
        INTERLEAVED=rotary is not None and rotary.interleaved,
        MOST=SCALED.get(cache.keys.dtype, 0.0),
        LANES=triton.next_power_of_2((max(heads.dim, heads.value_dim) + 1) // 2),
        BLOCK_SIZE=block_size,
        num_warps=1,
    )


@triton.jit
def _rotate_and_write(
    qkv,
    norms,
    squares,
    eps,
    positions,
    cos,
    sin,
    query_scale,
    indices,
    keys,
    values,
    key_scales,
    value_scales,
    QUERY: tl.constexpr,
    KV: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MOST: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    WIDTH: tl.constexpr = (QUERY + KV) * DIM + KV * VALUE_DIM
    dtype = qkv.dtype.element_ty
    token, head = tl.program_id(0), tl.program_id(1)
    is_value = head >= QUERY + KV
    start = tl.where(is_value, (QUERY + KV) * DIM + (head - QUERY - KV) * VALUE_DIM, head * DIM)
    dim = tl.where(is_value, VALUE_DIM, DIM)
    # Each lane has a pair of numbers. Numbers that are not rotated are paired with their neighbours.
    pair = tl.arange(0, LANES)
    turns = pair < ROTATED // 2
    one, other = 2 * pair, 2 * pair + 1
    if not INTERLEAVED:
        one, other = tl.where(turns, pair, one), tl.where(turns, pair + ROTATED // 2, other)
    place = qkv + token.to(tl.int64) * WIDTH + start
    first = tl.load(place + one, one < dim, 0.0).to(tl.float32)
    second = tl.load(place + other, other < dim, 0.0).to(tl.float32)
    if not is_value:
        if norms is not None:
            square = tl.sum(first * first + second * second, 0) / DIM
            if squares is not None:
                square = tl.load(squares + 2 * token + (head >= QUERY))
            scale = tl.rsqrt(square + eps)
            first *= scale * tl.load(norms + head * DIM + one, one < DIM, 0.0)
            second *= scale * tl.load(norms + head * DIM + other, other < DIM, 0.0)
        if ROTATED > 0:
            angle = tl.load(positions + token) * ROTATED
            turned = first * tl.load(cos + angle + one, turns, 1.0) + second * tl.load(sin + angle + one, turns, 0.0)
            second = second * tl.load(cos + angle + other, turns, 1.0) + first * tl.load(
                sin + angle + other, turns, 0.0
            )
            first = turned
            if query_scale is not None:
                scale = tl.where(head < QUERY, tl.load(query_scale + tl.load(positions + token)), 1.0)
                first, second = first * scale, second * scale
        first = first.to(dtype).to(tl.float32)
        second = second.to(dtype).to(tl.float32)
        tl.store(place + one, first.to(dtype), one < DIM)
        tl.store(place + other, second.to(dtype), other < DIM)
    if head >= QUERY:
        index = tl.load(indices + token)
        block, offset = index // BLOCK_SIZE, index % BLOCK_SIZE
        kv_head = (head - QUERY) % KV
        if key_scales is not None:
            peak = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 0)
            inverse = MOST / tl.where(peak > 0, peak, 1.0)
            first, second = first * inverse, second * inverse
            if keys.dtype.element_ty == tl.int8:
                first, second = nearest(first), nearest(second)
            scale_place = (block * KV + kv_head) * BLOCK_SIZE + offset
            tl.store((value_scales if is_value else key_scales) + scale_place, peak / MOST)
        to = (values if is_value else keys) + (index * KV + kv_head) * dim
        tl.store(to + one, first.to(keys.dtype.element_ty), one < dim)
        tl.store(to + other, second.to(keys.dtype.element_ty), other < dim)
