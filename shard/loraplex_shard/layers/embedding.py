"""The token embedding. Every rank has all of it, so looking up tokens needs no collective."""

import torch

from loraplex_shard.layers.parameters import LoadableLayer, TensorSlice
from loraplex_shard.ops.base import Operations, Step


class Embedding(LoadableLayer):
    def __init__(self, tensor: str, vocab_size: int, hidden_size: int, scale: float, ops: Operations) -> None:
        """Embeddings are multiplied by `scale`."""
        super().__init__(ops)
        self.scale = scale
        self.declare_matrix((vocab_size, hidden_size), TensorSlice(tensor, (vocab_size, hidden_size)), least_bits=8)

    def forward(self, step: Step, dtype: torch.dtype) -> torch.Tensor:
        """The embeddings of the step's tokens: [tokens, hidden]."""
        return self.ops.embedding(step, self.weight, dtype, self.scale)
