"""Attention beside torch's own for sequences of different lengths: whether both compute the same, and how fast each is.

torch's reads keys and values that lie in one piece, where they are copied from the cache before. It is for GPUs only:
without one, each sequence goes through torch's attention for single sequences.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.gpu.batches import batch_of
from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.decode import make_stepper
from bench.gpu.kernels import compiled, kernel_row
from loraplex_shard.ops.cuda.operations import CudaOperations
from loraplex_shard.shapes.batch import Batch
from loraplex_shard.shapes.cache import KVCache, LayerCache
from loraplex_shard.shapes.heads import Heads
from tests.shard.operations import BLOCK_SIZE

Chunks = list[tuple[int, int]]  # (positions computed before, tokens)
Attend = Callable[[], torch.Tensor]

MIXED: dict[DeviceName, Chunks] = {
    "cuda": [(700, 1), (30, 70), (0, 5), (4000, 1), (511, 300), (0, 1)],
    "cpu": [(17, 1), (3, 5)],
}
HEADS: dict[DeviceName, tuple[Heads, ...]] = {
    "cuda": (Heads(32, 8, 128), Heads(28, 4, 128), Heads(12, 12, 64), Heads(16, 8, 256), Heads(32, 8, 128, window=100)),
    "cpu": (Heads(4, 2, 16, window=7),),
}
ALLOWED = 2.0  # times torch's own error in the same dtype
LOADS: dict[DeviceName, dict[str, Chunks]] = {
    "cuda": {
        "1 decode of 1,024 tokens": [(1023, 1)],
        "1 decode of 8,192 tokens": [(8191, 1)],
        "32 decodes of 1,024 tokens": [(1023, 1)] * 32,
        "256 decodes of 1,024 tokens": [(1023, 1)] * 256,
        "a prompt of 2,048 tokens": [(0, 2048)],
        "a prompt of 8,192 tokens": [(0, 8192)],
        "the last 2,048 of 8,192 tokens": [(6144, 2048)],
        "a prompt of 1,024 tokens, 32 decodes": [(0, 1024), *[(1023, 1)] * 32],
    },
    "cpu": {"a prompt of 5 tokens, a decode": [(0, 5), (17, 1)]},
}
COPIED = 2 << 30  # bytes of keys and values of several layers: more than the GPU's cache has


def same(device: DeviceName) -> Iterator[Check]:
    dtypes = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float16,)
    for heads in HEADS[device]:
        for dtype in dtypes:
            window = f", window {heads.window}" if heads.window else ""
            shape = f"{heads.query} over {heads.kv} heads of {heads.dim}{window}, {str(dtype).removeprefix('torch.')}"
            yield Check(shape, partial(_compare, device, shape, heads, dtype))


def speed(device: DeviceName) -> Iterator[Check]:
    for name, chunks in LOADS[device].items():
        yield Check(name, partial(_measure, device, name, chunks))
    yield Check("registers", compiled)


def _compare(device: DeviceName, shape: str, heads: Heads, dtype: torch.dtype) -> Row:
    where = torch.device(device)
    batch, num_blocks = batch_of(MIXED[device], where)
    (layer,) = KVCache((heads,), num_blocks, BLOCK_SIZE, dtype, where, positions_first=True).layers
    layer.keys.normal_()
    layer.values.normal_()
    qkv = torch.randn(batch.starts[-1], heads.width, device=where).to(dtype)
    ops, keys_and_values = CudaOperations(where), _in_one_piece(layer, batch)
    ours = ops.attention(qkv, heads, ops.prepare(batch), layer)
    theirs = _torchs(device, qkv, heads, batch, keys_and_values)()
    exact = _one_by_one(qkv.float(), heads, batch, [(k.float(), v.float()) for k, v in keys_and_values])
    error, own = (float((each.float() - exact).abs().max()) for each in (ours, theirs))
    assert error <= ALLOWED * own, f"attention is off by {error:.2e}, torch's own by {own:.2e}"
    return {"heads": shape, "error": error, "torch's error": own}


def _measure(device: DeviceName, shape: str, chunks: Chunks) -> list[Row]:
    """In several layers, one after the other."""
    stepper = make_stepper(device)
    ops, where, dtype = stepper.decoder.ops, stepper.decoder.device, stepper.decoder.dtype
    heads: Heads = stepper.decoder.layers[0].attention.heads  # type: ignore[assignment, union-attr]
    batch, _ = batch_of(chunks, where)
    qkv = torch.randn(batch.starts[-1], heads.width, device=where).to(dtype)
    bytes_each = 2 * sum(batch.context_lengths) * heads.kv * heads.dim * dtype.itemsize
    layers = stepper.cache.layers[: max(1, COPIED // bytes_each)]
    copies = [_in_one_piece(layer, batch) for layer in layers]
    step = ops.prepare(batch)
    ours: list[Attend] = [partial(ops.attention, qkv, heads, step, layer) for layer in layers]
    theirs = [_torchs(device, qkv, heads, batch, copy) for copy in copies]
    pairs = sum(tokens * (2 * before + tokens + 1) // 2 for before, tokens in chunks)
    read, flops = float(len(layers) * bytes_each), 4.0 * len(layers) * pairs * heads.query * heads.dim
    return [
        kernel_row(device, name, f"{shape}, {len(layers)} layers", partial(_all, works), read, flops)
        for name, works in (("attention", ours), ("torch's", theirs))
    ]


def _all(works: Sequence[Attend]) -> None:
    for work in works:
        work()


def _in_one_piece(layer: LayerCache, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each sequence's keys and values, [positions, heads, dim]."""
    return [
        (
            layer.keys[table].permute(0, 3, 1, 2).flatten(0, 1)[:length],
            layer.values[table].transpose(1, 2).flatten(0, 1)[:length],
        )
        for table, length in (
            (batch.block_tables[row, : -(-length // BLOCK_SIZE)].long(), length)
            for row, length in zip(batch.rows, batch.context_lengths, strict=True)
        )
    ]


def _torchs(
    device: DeviceName,
    qkv: torch.Tensor,
    heads: Heads,
    batch: Batch,
    keys_and_values: list[tuple[torch.Tensor, torch.Tensor]],
) -> Attend:
    if device == "cpu":
        return partial(_one_by_one, qkv, heads, batch, keys_and_values)
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}  # older versions always do
    queries = _queries(qkv, heads).contiguous()
    keys, values = (torch.cat(each) for each in zip(*keys_and_values, strict=True))
    starts = torch.tensor(batch.starts, dtype=torch.int32, device=device)
    ends = torch.tensor([0, *batch.context_lengths], device=device).cumsum(0).int()
    longest = int(starts.diff().max()), max(batch.context_lengths)
    window = (heads.window or 0) - 1, 0  # positions before a token that it sees, -1 for all, and after it

    def attend() -> torch.Tensor:
        out = varlen_attn(
            queries, keys, values, starts, ends, *longest, scale=heads.scale, window_size=window, **options
        )
        assert isinstance(out, torch.Tensor)
        return out.flatten(1)

    return attend


def _one_by_one(
    qkv: torch.Tensor, heads: Heads, batch: Batch, keys_and_values: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    results = []
    for row, (keys, values) in enumerate(keys_and_values):
        own = slice(batch.starts[row], batch.starts[row + 1])
        position, seen = batch.positions[own, None], torch.arange(len(keys), device=qkv.device)
        visible = (seen <= position) & (seen > position - (heads.window or len(keys)))
        q, k, v = (each.transpose(0, 1) for each in (_queries(qkv[own], heads), keys, values))
        out = F.scaled_dot_product_attention(q, k, v, visible, scale=heads.scale, enable_gqa=True)
        results.append(out.transpose(0, 1).flatten(1))
    return torch.cat(results)


def _queries(qkv: torch.Tensor, heads: Heads) -> torch.Tensor:
    return torch.unflatten(qkv[:, : heads.query * heads.dim], 1, (heads.query, heads.dim))
