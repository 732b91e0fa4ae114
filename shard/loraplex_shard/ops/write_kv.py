"""Writes a step's keys and values into the paged cache."""

import torch


def write_kv(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, cache_indices: torch.Tensor
) -> None:
    """key and value [tokens, kv_heads, head_dim] go to position cache_indices [tokens] of the flattened cache.

    keys and values are one layer's cache [num_blocks, block_size, kv_heads, head_dim].
    """
    keys.flatten(0, 1).index_copy_(0, cache_indices, key)
    values.flatten(0, 1).index_copy_(0, cache_indices, value)
