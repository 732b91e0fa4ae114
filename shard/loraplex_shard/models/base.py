"""What a model offers to the code that runs it, whether our own decoder or transformers' code computes it."""

from typing import Protocol

import torch

from loraplex_shard.lora.peft.base import ServedMatrices, ServedWeights, StoredTensors
from loraplex_shard.ops.base import Outputs
from loraplex_shard.shapes.batch import Inputs, Segment
from loraplex_shard.shapes.cache import KVCache
from loraplex_shard.shapes.layout import LinearLayout


class Model(Protocol):
    """A rank's part of a model."""

    @property
    def modeling_code(self) -> str:
        """Whose code computes the model: "loraplex" or "transformers"."""

    @property
    def generates(self) -> bool:
        """Whether the model has an lm head. If not, `logits` must not be called."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def embedding_name(self) -> str:
        """PEFT's name for the module that looks up tokens."""

    @property
    def head_name(self) -> str:
        """PEFT's name for the lm head."""

    @property
    def uncalled(self) -> tuple[str, ...]:
        """The linear layers whose weights its code reads without calling them. Adapters have no effect there."""

    @property
    def tensors(self) -> StoredTensors:
        """The checkpoint's tensors, by the names that they have in the model."""

    @property
    def served(self) -> ServedWeights | None:
        """The weights as the model computes with them; None if its modules differ from those that PEFT adapts."""

    @property
    def matrices(self) -> ServedMatrices:
        """The matrices of linear layers as the model computes with them."""

    @property
    def layouts(self) -> tuple[LinearLayout, ...]:
        """All linear layers of this rank that adapters may touch, the lm head included."""

    def __call__(self, inputs: Inputs, cache: KVCache) -> Outputs:
        """Computes the inputs' tokens and writes their keys and values to the cache."""

    def logits(self, hidden: torch.Tensor, segments: tuple[Segment, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """hidden [n, hidden] -> logits [n, vocab_size] float32, and whether all numbers of a row are finite, [n] bool.
        The result is on rank 0. The other ranks must call it as well, and get None.

        `segments` are runs of rows of `hidden`, for adapters that touch the lm head.
        """

    @property
    def state_bytes(self) -> int:
        """Size of what the model keeps for each sequence besides its blocks. If it is not 0, every sequence must be
        computed from its first token on, whatever the cache has of others."""

    def new_cache(
        self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None, sequences: int = 0
    ) -> KVCache:
        """An empty cache of this rank's KV heads, on the model's device. `dtype` is the model's by default, or
        torch.int8. If the model keeps states, the cache has rows for the states of `sequences` sequences.
        """

    def cache_block_bytes(self, block_size: int, dtype: torch.dtype | None = None) -> int:
        """The size of a block of such a cache on this rank, in bytes."""
