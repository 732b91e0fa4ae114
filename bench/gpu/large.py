"""Places in memory beyond what 32 bits count."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu.batches import batch_of
from bench.gpu.check import Check, DeviceName, Row
from loraplex_shard.ops.cuda.operations import CudaOperations
from loraplex_shard.shapes.cache import KVCache, LayerCache
from loraplex_shard.shapes.heads import Heads
from tests.shard.operations import BLOCK_SIZE, angles, random

HEADS = Heads(query=32, kv=8, dim=128)
CHUNKS = [(700, 1), (30, 70), (0, 5)]
# More than 2^32 elements of keys: block 262,144 begins there.
BLOCKS: dict[DeviceName, int] = {"cuda": 270_000, "cpu": 200}


def checks(device: DeviceName) -> Iterator[Check]:
    yield Check("blocks at a large cache's end", partial(_far_blocks, device))


def _far_blocks(device: DeviceName) -> Row:
    """The same as in a cache that is no larger than needed."""
    where = torch.device(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    heads = HEADS if device == "cuda" else Heads(query=2, kv=1, dim=16)
    chunks = CHUNKS if device == "cuda" else [(17, 1), (3, 5)]
    batch, num_blocks = batch_of(chunks, where)
    near = _layer(heads, num_blocks, dtype, where)
    far = _layer(heads, BLOCKS[device], dtype, where)
    first = BLOCKS[device] - num_blocks
    for small, large in ((near.keys, far.keys), (near.values, far.values)):
        small.copy_(random(1, *small.shape))
        large[first:] = small
    ops, rotary = CudaOperations(where), angles(1000, heads.dim).to(where)
    qkv = random(2, batch.starts[-1], heads.width, dtype=dtype).to(where)
    results = []
    for layer, at in ((near, batch), (far, batch_of(chunks, where, first)[0])):
        mine, step = qkv.clone(), ops.prepare(at)
        ops.rotate_and_write(mine, heads, None, rotary, step, layer)
        results.append(ops.attention(mine, heads, step, layer))
    assert results[0].isfinite().all() and results[0].equal(results[1]), "attention differs"
    assert far.keys[first:].equal(near.keys) and far.values[first:].equal(near.values), "what is written differs"
    return {"elements of keys": far.keys.numel(), "GB": (far.keys.nbytes + far.values.nbytes) / 1e9}


def _layer(heads: Heads, num_blocks: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
    (layer,) = KVCache((heads,), num_blocks, BLOCK_SIZE, dtype, device, positions_first=True).layers
    return layer
