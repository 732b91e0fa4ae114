"""The paged KV cache of one rank: tensors only. Who owns which block is the router's business."""

import torch


class KVCache:
    """Keys and values of all layers, in blocks of `block_size` token positions.

    A block is cleared before its first position is written, so that what attention reads and masks is finite whatever
    the block held before. Memory that no block has touched yet is only reserved.
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
        shape = (layers, 2, num_blocks, block_size, kv_heads, head_dim)
        self._blocks = torch.empty(shape, dtype=dtype, device=device)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys = tuple(self._blocks[:, 0].unbind())  # each [num_blocks, block_size, kv_heads, head_dim]
        self.values = tuple(self._blocks[:, 1].unbind())

    @staticmethod
    def block_bytes(layers: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes in all layers."""
        return layers * 2 * block_size * kv_heads * head_dim * dtype.itemsize

    def clear(self, blocks: torch.Tensor) -> None:
        """Zeroes these blocks ([n] int64) in all layers."""
        self._blocks.index_fill_(2, blocks, 0)
