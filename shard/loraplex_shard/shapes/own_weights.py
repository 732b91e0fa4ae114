"""An adapter's own weights outside the linear layers, instead of the base's: embeddings, rows of the lm head, norms."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from loraplex_shard.kernels.tables import row

Function = Callable[[torch.Tensor], torch.Tensor]


def tensors_of(map_all: Callable[[Function], object]) -> list[torch.Tensor]:
    """The tensors to which `map_all` applies a function, in its order."""
    found = list[torch.Tensor]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_all(keep)
    return found


@dataclass(frozen=True, slots=True)
class OwnEmbedding:
    """Tokens in `ids` have an embedding of their own. Others have the base's, times `factors` if there are any, plus
    the product of their row of `shrink` with `expand`. All with the model's scale of embeddings in them."""

    ids: torch.Tensor  # [n] int64, ascending
    rows: torch.Tensor  # [n, hidden]
    shrink: torch.Tensor  # [tokens, lora_rank]; none for tokens beyond
    expand: torch.Tensor  # [lora_rank, hidden], times the adapter's scale; lora_rank may be 0
    factors: torch.Tensor | None  # [hidden] float32
    table: torch.Tensor = field(init=False)  # int64: an OwnEmbedding (see kernels/csrc/tables.h)

    def __post_init__(self) -> None:
        numbers = row(
            "OwnEmbedding",
            count=len(self.ids),
            tokens=len(self.shrink),
            lora_rank=len(self.expand),
            ids=self.ids.data_ptr(),
            rows=self.rows.data_ptr(),
            shrink=self.shrink.data_ptr(),
            expand=self.expand.data_ptr(),
            factors=0 if self.factors is None else self.factors.data_ptr(),
        )
        object.__setattr__(self, "table", torch.tensor(numbers))

    def map(self, function: Function) -> "OwnEmbedding":
        factors = None if self.factors is None else function(self.factors)
        return OwnEmbedding(
            function(self.ids), function(self.rows), function(self.shrink), function(self.expand), factors
        )


@dataclass(frozen=True, slots=True)
class OwnHead:
    """The logits of some tokens come from rows of its own. It may have more tokens than the model, or fewer."""

    vocab_size: int
    ids: torch.Tensor  # [n] int64, ascending: of this rank's outputs of the lm head
    rows: Any  # [n, hidden], packed for operations, as is `added`
    biases: torch.Tensor | None  # [n]
    added: Any | None  # [tokens beyond the model's vocabulary, hidden]
    added_biases: torch.Tensor | None

    def map(self, function: Function) -> "OwnHead":
        return replace(
            self,
            ids=function(self.ids),
            rows=self.rows.map(function),
            biases=None if self.biases is None else function(self.biases),
            added=None if self.added is None else self.added.map(function),
            added_biases=None if self.added_biases is None else function(self.added_biases),
        )


@dataclass(frozen=True, slots=True)
class OwnWeights:
    embedding: OwnEmbedding | None = None
    head: OwnHead | None = None
    norms: tuple[torch.Tensor | None, ...] = ()  # float32: by index of the norms' parameters; None: the base's
    norm_table: torch.Tensor = field(init=False)  # [norms] int64: their addresses; 0: the base's

    def __post_init__(self) -> None:
        addresses = [0 if norm is None else norm.data_ptr() for norm in self.norms]
        object.__setattr__(self, "norm_table", torch.tensor(addresses, dtype=torch.int64))

    def map(self, function: Function) -> "OwnWeights":
        """The same with each tensor replaced."""
        return OwnWeights(
            None if self.embedding is None else self.embedding.map(function),
            None if self.head is None else self.head.map(function),
            tuple(None if norm is None else function(norm) for norm in self.norms),
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        return tensors_of(self.map)


NOTHING = OwnWeights()
