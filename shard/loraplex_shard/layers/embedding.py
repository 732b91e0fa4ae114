"""The token embedding. Whole on every rank, so that looking tokens up needs no collective."""

import torch

from loraplex_shard.layers.sources import Source, SourcedLayer
from loraplex_shard.ops.base import Operations, Step


class Embedding(SourcedLayer):
    def __init__(self, tensor: str, vocab_size: int, hidden_size: int, scale: float, ops: Operations) -> None:
        """`scale`: what embeddings are multiplied by."""
        super().__init__(ops)
        self.scale = scale
        self.declare_matrix((vocab_size, hidden_size), Source(tensor, (vocab_size, hidden_size)), least_bits=8)

    def forward(self, step: Step, dtype: torch.dtype) -> torch.Tensor:
        """Of the step's tokens: [tokens, hidden]."""
        return self.ops.embedding(step, self.weight, dtype, self.scale)
