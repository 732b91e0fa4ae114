"""Pools the hidden states of whole sequences, which arrive in chunks, and classifies them. Independent of plans, ranks
and the model."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from loraplex_shard.checkpoint.base import PoolingSpec
from loraplex_shard.shapes.classifier import Classifier


@dataclass(frozen=True, slots=True)
class PooledChunk:
    """The positions from `begin` on of the sequence in a row; one that takes over the row begins at 0."""

    row: int
    begin: int
    hidden: Tensor  # [tokens, hidden]
    tokens: Tensor  # [tokens] int64
    last: bool
    classifier: Classifier | None  # None: the sequence is embedded


class Pooling:
    """Holds a vector for each unfinished row."""

    def __init__(self, spec: PoolingSpec) -> None:
        self._spec = spec
        self._vectors: dict[int, Tensor] = {}

    def clear(self) -> None:
        self._vectors.clear()

    def add(self, chunk: PooledChunk) -> Tensor | None:
        """What is known with the chunk, [n] float32: the vector or the logits of a sequence that it completes, or the
        logits of its tokens, one after the other."""
        classifier = chunk.classifier
        if classifier is None:
            self._add_embedded(chunk)
            return self._embedding(chunk) if chunk.last else None
        if classifier.classes.of_tokens:
            return classifier.logits(chunk.hidden).flatten()
        self._add_classified(chunk, classifier.classes.pad_token_id)
        return classifier.logits(self._vectors.pop(chunk.row)) if chunk.last else None

    def _add_embedded(self, chunk: PooledChunk) -> None:
        row, begin, hidden = chunk.row, chunk.begin, chunk.hidden
        if self._spec.mode == "mean":
            total = hidden.sum(0, dtype=torch.float32)
            self._vectors[row] = total if begin == 0 else self._vectors[row] + total
        elif self._spec.mode == "last" or begin == 0:
            self._vectors[row] = _own(hidden[-1 if self._spec.mode == "last" else 0])

    def _embedding(self, chunk: PooledChunk) -> Tensor:
        vector = self._vectors.pop(chunk.row)
        if self._spec.mode == "mean":
            vector = vector / (chunk.begin + len(chunk.hidden))
        return normalize(vector, dim=0) if self._spec.normalized else vector

    def _add_classified(self, chunk: PooledChunk, pad_token_id: int | None) -> None:
        """Keeps the last token that is not padding or, where all are, the first, as transformers does."""
        if chunk.begin == 0:
            self._vectors[chunk.row] = _own(chunk.hidden[0])
        kept = chunk.hidden if pad_token_id is None else chunk.hidden[chunk.tokens != pad_token_id]
        if len(kept):
            self._vectors[chunk.row] = _own(kept[-1])


def _own(vector: Tensor) -> Tensor:
    """A copy in float32, since the next step overwrites hidden states."""
    return vector.to(torch.float32, copy=True)
