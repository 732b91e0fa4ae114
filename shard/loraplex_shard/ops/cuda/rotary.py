"""Rotates queries and keys and writes keys and values to the paged cache: one program per token and head."""

import torch
import triton
import triton.language as tl

from loraplex_shard.ops.base import HeadNorms, Heads
from loraplex_shard.ops.cuda.quantized import nearest
from loraplex_shard.shapes.batch import Batch
from loraplex_shard.shapes.cache import LayerCache


def rotate_and_write(
    qkv: torch.Tensor,
    heads: Heads,
    norms: HeadNorms | None,
    batch: Batch,
    angles: tuple[torch.Tensor, torch.Tensor],
    cache: LayerCache,
) -> None:
    """As Operations.rotate_and_write says; angles are cos and sin by position."""
    half = heads.dim // 2
    _rotate_and_write[(len(qkv), heads.query + 2 * heads.kv)](
        qkv,
        None if norms is None else norms.weight,
        0.0 if norms is None else norms.eps,
        batch.positions,
        *angles,
        batch.cache_indices,
        cache.keys,
        cache.values,
        cache.key_scales,
        cache.value_scales,
        QUERY=heads.query,
        KV=heads.kv,
        HALF=half,
        LANES=triton.next_power_of_2(half),
        BLOCK_SIZE=cache.keys.shape[-1],
        num_warps=1,
    )


@triton.jit
def _rotate_and_write(
    qkv,
    norms,
    eps,
    positions,
    cos,
    sin,
    indices,
    keys,
    values,
    key_scales,
    value_scales,
    QUERY: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    DIM: tl.constexpr = 2 * HALF
    dtype = qkv.dtype.element_ty
    token, head = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, LANES)
    within = lanes < HALF
    place = qkv + (token.to(tl.int64) * (QUERY + 2 * KV) + head) * DIM + lanes
    first = tl.load(place, within, 0.0).to(tl.float32)
    second = tl.load(place + HALF, within, 0.0).to(tl.float32)
    if head < QUERY + KV:
        if norms is not None:
            scale = tl.rsqrt(tl.sum(first * first + second * second, 0) / DIM + eps)
            first *= scale * tl.load(norms + head * DIM + lanes, within, 0.0).to(tl.float32)
            second *= scale * tl.load(norms + head * DIM + HALF + lanes, within, 0.0).to(tl.float32)
        angle = tl.load(positions + token) * DIM + lanes
        turned = first * tl.load(cos + angle, within, 0.0) + second * tl.load(sin + angle, within, 0.0)
        second = second * tl.load(cos + angle + HALF, within, 0.0) + first * tl.load(sin + angle + HALF, within, 0.0)
        first = turned.to(dtype).to(tl.float32)
        second = second.to(dtype).to(tl.float32)
        tl.store(place, first.to(dtype), within)
        tl.store(place + HALF, second.to(dtype), within)
    if head >= QUERY:
        index = tl.load(indices + token)
        block, offset = index // BLOCK_SIZE, index % BLOCK_SIZE
        is_key = head < QUERY + KV
        own = block * KV + (head - QUERY) % KV
        if key_scales is not None:
            peak = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 0)
            inverse = 127 / tl.where(peak > 0, peak, 1.0)
            first, second = nearest(first * inverse), nearest(second * inverse)
            tl.store((key_scales if is_key else value_scales) + own * BLOCK_SIZE + offset, peak / 127)
        if is_key:
            where = keys + (own * DIM + lanes) * BLOCK_SIZE + offset
            tl.store(where, first.to(keys.dtype.element_ty), within)
            tl.store(where + HALF * BLOCK_SIZE, second.to(keys.dtype.element_ty), within)
        else:
            where = values + (own * BLOCK_SIZE + offset) * DIM + lanes
            tl.store(where, first.to(values.dtype.element_ty), within)
            tl.store(where + HALF, second.to(values.dtype.element_ty), within)
