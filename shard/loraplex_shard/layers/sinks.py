"""Attention sinks: for each query head, a score that does not belong to a position (arXiv 2309.17453)."""

import torch
from torch import nn

from loraplex_shard.layers.parameters import LoadableLayer, TensorSlice
from loraplex_shard.ops.base import Operations


class Sinks(LoadableLayer):
    scores: nn.Parameter  # [query heads of this rank] float32

    def __init__(self, attention: str, heads: int, own: slice, ops: Operations) -> None:
        """`heads` is the model's number of query heads, and `own` are this rank's."""
        super().__init__(ops)
        scores = TensorSlice(f"{attention}.sinks", (heads,), own)
        self.declare("scores", (own.stop - own.start,), scores, dtype=torch.float32)
