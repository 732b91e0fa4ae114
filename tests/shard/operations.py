"""Batches, caches and implementations for the tests of the operations."""

import os
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from transformers import LlamaConfig

from loraplex_shard.kernels.library import Kernels, build
from loraplex_shard.models.rope import rotary
from loraplex_shard.models.spec import RotarySpec
from loraplex_shard.ops.base import Rotary
from loraplex_shard.ops.cpu.operations import CpuOperations
from loraplex_shard.shapes.batch import Batch
from loraplex_shard.shapes.cache import KVCache, LayerCache
from loraplex_shard.shapes.heads import Heads

BLOCK_SIZE = 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def cache_directory(name: str) -> Path:
    """A folder for all tests' compiled kernels, whose names depend on their sources."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraplex-tests" / name
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def kernels_directory() -> Path:
    return cache_directory("kernels")


@cache
def cpu_operations(name: str) -> CpuOperations:
    return CpuOperations(Kernels(build(kernels_directory(), name)))


def paged_batch(chunks: list[tuple[int, int]], seed: int) -> tuple[Batch, int]:
    """A batch of chunks over shuffled blocks, and the number of blocks. A chunk is (positions computed before,
    tokens)."""
    needed = [-(-(before + tokens) // BLOCK_SIZE) for before, tokens in chunks]
    num_blocks = sum(needed) + 2
    blocks = Random(seed).sample(range(num_blocks), num_blocks)
    tables = torch.zeros(len(chunks), max(needed), dtype=torch.int32)
    starts, positions, indices = [0], [], []
    for row, ((before, tokens), count) in enumerate(zip(chunks, needed, strict=True)):
        own, blocks = blocks[:count], blocks[count:]
        tables[row, :count] = torch.tensor(own)
        starts.append(starts[-1] + tokens)
        positions += range(before, before + tokens)
        indices += [own[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(before, before + tokens)]
    batch = Batch(
        token_ids=torch.zeros(starts[-1], dtype=torch.long),
        positions=torch.tensor(positions),
        cache_indices=torch.tensor(indices),
        starts=np.array(starts),
        context_lengths=np.array([before + tokens for before, tokens in chunks]),
        rows=np.arange(len(chunks)),
        block_tables=tables,
        segments=(),
    )
    return batch, num_blocks


def filled_cache(
    num_blocks: int, heads: Heads, dtype: torch.dtype, seed: int, positions_first: bool = False
) -> KVCache:
    """A cache layer with random keys and values, the same in both forms."""
    generator = torch.Generator().manual_seed(seed)
    device = torch.device("cpu")
    cache = KVCache((heads,), num_blocks, BLOCK_SIZE, dtype, device, positions_first=positions_first)
    (layer,) = cache.layers
    for tensor in (layer.keys, layer.values):
        if dtype == torch.int8:
            tensor.random_(-127, 128, generator=generator)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    for scales in (layer.key_scales, layer.value_scales):
        if scales is not None:
            scales.uniform_(0.001, 0.02, generator=generator)
    return cache


def angles(positions: int, dim: int, interleaved: bool = False) -> Rotary:
    """The tables of models/rope.py."""
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1)
    return rotary(config, RotarySpec(dim, interleaved), positions)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
    """Asserts equality within rounding, relative to the values' size, because sums run in a different order."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    bound = factor * TOLERANCE[actual.dtype] * max(1.0, float(expected.float().abs().amax()))
    assert float((actual.float() - expected.float()).abs().amax()) <= bound


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cached(layer: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values in a layer's cache, with their scales, if any, applied."""
    if layer.key_scales is None or layer.value_scales is None:
        return layer.keys, layer.values
    return layer.keys.float() * layer.key_scales[:, :, None], layer.values.float() * layer.value_scales[..., None]
