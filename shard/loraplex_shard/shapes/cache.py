"""The paged KV cache of one rank: tensors only. Who owns which block is the router's business."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex_shard.device.memory import reserve


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values. Keys are transposed, so that the scores of a block's positions lie side by side."""

    keys: torch.Tensor  # [num_blocks, kv_heads, head_dim, block_size]
    values: torch.Tensor  # [num_blocks, kv_heads, block_size, head_dim]
    key_scales: torch.Tensor | None  # [num_blocks, kv_heads, block_size] float32, if keys and values are int8
    value_scales: torch.Tensor | None


class KVCache:
    """Keys and values of all layers, in blocks of `block_size` token positions.

    `dtype` is that of the model, or torch.int8: then each position's key and value of each head has a scale.
    Memory that no block has touched yet is only reserved, and holds whatever it held.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        positions = (layers, num_blocks, kv_heads, block_size)
        keys = _empty((layers, num_blocks, kv_heads, head_dim, block_size), dtype, device)
        values = _empty((*positions, head_dim), dtype, device)
        key_scales = value_scales = (None,) * layers
        if dtype == torch.int8:
            key_scales, value_scales = torch.empty((2, *positions), dtype=torch.float32, device=device)
        self.layers = tuple(map(LayerCache, keys, values, key_scales, value_scales))

    @staticmethod
    def block_bytes(layers: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes in all layers."""
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        return layers * 2 * block_size * kv_heads * (head_dim * dtype.itemsize + scale)


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return reserve(torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape)
