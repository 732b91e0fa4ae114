"""The token embedding. Whole on every rank, so that looking tokens up needs no collective."""

import torch
import torch.nn.functional as F
from torch import nn

from loraplex_shard.layers.sources import Source, SourcedLayer


class Embedding(SourcedLayer):
    weight: nn.Parameter  # [vocab_size, hidden]

    def __init__(self, tensor: str, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.declare("weight", (vocab_size, hidden_size), Source(tensor, (vocab_size, hidden_size)))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [tokens] int64 -> [tokens, hidden]."""
        return F.embedding(token_ids, self.weight)
