"""Normalization layers, whole on every rank."""

import torch
from torch import nn

from loraplex_shard.layers.sources import Source, SourcedLayer
from loraplex_shard.ops.base import HeadNorms, Operations


class RmsNorm(SourcedLayer):
    scale: nn.Parameter  # [hidden]

    def __init__(self, tensor: str, hidden_size: int, eps: float, ops: Operations) -> None:
        super().__init__(ops)
        self.eps = eps
        self.declare("scale", (hidden_size,), Source(tensor, (hidden_size,)))

    def forward(self, hidden: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
        """Adds delta, if there is one, to hidden [tokens, hidden], in place; returns the norm of that."""
        if delta is None:
            return self.ops.rms_norm(hidden, self.scale, self.eps)
        return self.ops.add_rms_norm(hidden, delta, self.scale, self.eps)


class HeadNorm(SourcedLayer):
    """The scales by which query and key heads are normalized, each head by itself."""

    scale: nn.Parameter  # [heads + kv_heads, head_dim]: one row per head, so that one operation does both

    def __init__(
        self,
        query_tensor: str,
        key_tensor: str,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        ops: Operations,
    ) -> None:
        super().__init__(ops)
        self.eps = eps
        self.declare(
            "scale",
            (heads + kv_heads, head_dim),
            Source(query_tensor, (head_dim,), repeat=heads),
            Source(key_tensor, (head_dim,), repeat=kv_heads),
        )

    def forward(self) -> HeadNorms:
        return HeadNorms(self.scale, self.eps)
