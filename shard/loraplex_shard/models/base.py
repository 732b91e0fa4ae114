"""What a model offers to those who run it, whichever way it is computed."""

from typing import Protocol

import torch

from loraplex_shard.lora.peft.base import ServedMatrices, StoredTensors
from loraplex_shard.shapes.batch import Batch, Segment
from loraplex_shard.shapes.cache import KVCache
from loraplex_shard.shapes.layout import LinearLayout


class Model(Protocol):
    """One rank's part of a model."""

    @property
    def modeling_code(self) -> str:
        """Whose code computes it: "loraplex" or "transformers"."""

    @property
    def generates(self) -> bool:
        """Whether it has an lm head; else `logits` must not be called."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def embedding_name(self) -> str:
        """The module that looks tokens up, as PEFT calls it."""

    @property
    def head_name(self) -> str:
        """The lm head, likewise."""

    @property
    def tensors(self) -> StoredTensors:
        """The checkpoint's, under the names that the model's modules give them."""

    @property
    def served(self) -> ServedMatrices | None:
        """Its linear layers' matrices as it computes with them; None if its modules do not hold them as PEFT's do."""

    @property
    def layouts(self) -> tuple[LinearLayout, ...]:
        """All linear layers of this rank that adapters may touch, the lm head included."""

    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Computes the batch's tokens and writes their keys and values: [tokens, hidden], as the lm head takes them."""

    def logits(self, hidden: torch.Tensor, segments: tuple[Segment, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """hidden [n, hidden] -> logits [n, vocab_size] float32, and whether all of each row are finite [n] bool, on
        rank 0; None on the others, which must call it as well.

        `segments` are runs of rows of `hidden`, for adapters that touch the lm head.
        """

    def new_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache of this rank's KV heads, on the model's device; of its dtype, or of torch.int8."""

    def cache_block_bytes(self, block_size: int, dtype: torch.dtype | None = None) -> int:
        """Bytes that one block of such a cache takes on this rank."""
