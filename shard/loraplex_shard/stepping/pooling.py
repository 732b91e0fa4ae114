"""Pools the hidden states of whole sequences, which arrive in chunks. Independent of plans, ranks and the model."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from loraplex_shard.checkpoint.base import PoolingSpec


class Pooling:
    """Holds a vector for each unfinished row."""

    def __init__(self, spec: PoolingSpec) -> None:
        self._spec = spec
        self._vectors: dict[int, Tensor] = {}

    def clear(self) -> None:
        self._vectors.clear()

    def add(self, row: int, begin: int, hidden: Tensor) -> None:
        """Adds the positions from `begin` on, [tokens, hidden]; a sequence that takes over the row begins at 0."""
        if self._spec.mode == "mean":
            total = hidden.sum(0, dtype=torch.float32)
            self._vectors[row] = total if begin == 0 else self._vectors[row] + total
        elif self._spec.mode == "last" or begin == 0:
            self._vectors[row] = hidden[-1 if self._spec.mode == "last" else 0].float()

    def finish(self, row: int, length: int) -> Tensor:
        """[hidden] float32, of a sequence of that many positions."""
        vector = self._vectors.pop(row)
        if self._spec.mode == "mean":
            vector = vector / length
        return normalize(vector, dim=0) if self._spec.normalized else vector
