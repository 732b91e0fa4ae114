"""Pools the hidden states of whole sequences, which arrive in chunks. Independent of plans, ranks and the model."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Pooling:
    """The mean over a sequence's positions, or its last one, as a vector of length 1. Holds a vector for each
    unfinished row."""

    def __init__(self, last_token: bool = False) -> None:
        self._last_token = last_token
        self._sums: dict[int, Tensor] = {}

    def clear(self) -> None:
        self._sums.clear()

    def add(self, row: int, begin: int, hidden: Tensor) -> None:
        """Adds the positions from `begin` on, [tokens, hidden]; a sequence that takes over the row begins at 0."""
        total = hidden[-1].float() if self._last_token else hidden.sum(0, dtype=torch.float32)
        self._sums[row] = total if begin == 0 or self._last_token else self._sums[row] + total

    def finish(self, row: int) -> Tensor:
        """[hidden] float32. The mean's length does not depend on how many positions were summed up."""
        return normalize(self._sums.pop(row), dim=0)
