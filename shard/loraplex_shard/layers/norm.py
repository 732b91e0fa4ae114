"""Normalization layers, whole on every rank."""

import torch
from torch import nn

from loraplex_shard.layers.sources import Source, SourcedLayer
from loraplex_shard.ops.rms_norm import rms_norm


class RmsNorm(SourcedLayer):
    weight: nn.Parameter  # [hidden]

    def __init__(self, tensor: str, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.declare("weight", (hidden_size,), Source(tensor, (hidden_size,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden] -> the same shape."""
        return rms_norm(x, self.weight, self.eps)


class HeadNorm(SourcedLayer):
    """Normalizes each query and key head by itself, queries and keys with a weight of their own."""

    weight: nn.Parameter  # [heads + kv_heads, head_dim]: one row per head, so that one operation does both

    def __init__(
        self, query_tensor: str, key_tensor: str, heads: int, kv_heads: int, head_dim: int, eps: float
    ) -> None:
        super().__init__()
        self.eps = eps
        self.declare(
            "weight",
            (heads + kv_heads, head_dim),
            Source(query_tensor, (head_dim,), repeat=heads),
            Source(key_tensor, (head_dim,), repeat=kv_heads),
        )

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """heads [tokens, heads + kv_heads, head_dim], the query heads first -> the same shape."""
        return rms_norm(heads, self.weight, self.eps)
