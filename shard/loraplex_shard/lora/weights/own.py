"""What an adapter has of its own outside the linear layers, in the form that operations read, and as far as this rank
has a use for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.weights.deltas import Delta, converted
from loraplex_shard.shapes.layout import LinearLayout, VocabularyLayout
from loraplex_shard.shapes.own_weights import OwnEmbedding, OwnHead, OwnWeights


def own_weights(
    deltas: Mapping[str, Delta],
    norms: tuple[torch.Tensor | None, ...],
    layouts: Sequence[LinearLayout],
    vocabulary: VocabularyLayout,
    pack: Callable[[torch.Tensor], Any],
) -> OwnWeights:
    """`pack` brings matrices into the form that operations read.

    Raises AdapterInvalidError, naming the module, for values that are not finite, or not in the model's dtype.
    """
    embedding, head = deltas.get(vocabulary.embedding), deltas.get(vocabulary.head)
    return OwnWeights(
        None if embedding is None else _embedding(embedding, vocabulary),
        None if head is None or head.own is None else _head(head, layouts, vocabulary, pack),
        norms,
    )


def _embedding(delta: Delta, vocabulary: VocabularyLayout) -> OwnEmbedding:
    name, scale, dtype = vocabulary.embedding, vocabulary.scale, vocabulary.dtype
    ids, rows = torch.zeros(0, dtype=torch.int64), torch.zeros(0, vocabulary.hidden_size, dtype=dtype)
    if delta.own is not None:
        ids, rows = delta.own.ids, converted(f"{name}.weight", delta.own.rows, scale, dtype)
    shrink = converted(f"{name}.lora_embedding_A", delta.a.T, 1.0, dtype)
    expand = converted(f"{name}.lora_embedding_B", delta.b.T, delta.scale * scale, dtype)
    factors = None if delta.gain is None else delta.gain.float()
    if factors is not None and not factors.isfinite().all():
        raise AdapterInvalidError(f"what the adapter multiplies {name} by is NaN or infinite")
    return OwnEmbedding(ids, rows, shrink.contiguous(), expand.contiguous(), factors)


def _head(
    delta: Delta, layouts: Sequence[LinearLayout], vocabulary: VocabularyLayout, pack: Callable[[torch.Tensor], Any]
) -> OwnHead:
    """The first rank has the rows of tokens that the model does not have."""
    assert delta.own is not None
    (run,) = next(part.rows for layout in layouts for part in layout.parts if part.module == vocabulary.head)
    ids, rows = delta.own.ids, converted(f"{vocabulary.head}.weight", delta.own.rows, 1.0, vocabulary.dtype)
    here = (ids >= run.start) & (ids < run.stop)
    added = ids >= vocabulary.vocab_size if run.start == 0 else torch.zeros_like(here)
    biases = delta.own.biases
    if biases is not None:
        biases = converted(f"{vocabulary.head}.bias", biases, 1.0, vocabulary.dtype)
    biases_here, biases_added = (None, None) if biases is None else (biases[here], biases[added])
    rows_added = pack(rows[added]) if added.any() else None
    return OwnHead(delta.own.count, ids[here] - run.start, pack(rows[here]), biases_here, rows_added, biases_added)
