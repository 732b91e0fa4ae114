"""Logits of adapters with their own rows of the lm head, and maybe with another vocabulary than the model's."""

from collections.abc import Sequence

import torch

from loraplex_shard.ops.base import Operations
from loraplex_shard.shapes.batch import Segment

Scored = tuple[torch.Tensor, torch.Tensor]


def own_all_logits(segments: Sequence[Segment], rows: int, outputs: int) -> bool:
    """Whether adapters have rows of their own for all of these outputs of all rows, so that the base's are not used."""
    owned = [(segment, own) for segment in segments if (own := segment.adapter.own.head) is not None]
    return sum(segment.stop - segment.start for segment, own in owned if len(own.ids) == outputs) == rows


def put_own_logits(ops: Operations, out: torch.Tensor, hidden: torch.Tensor, segments: Sequence[Segment]) -> None:
    """Replaces, in out [n, this rank's outputs of the lm head] of hidden [n, hidden], the base's outputs by those that
    adapters have rows of their own for."""
    for segment in segments:
        own = segment.adapter.own.head
        if own is not None and len(own.ids):
            run = slice(segment.start, segment.stop)
            if len(own.ids) == out.shape[1]:
                ops.put_linear(out[run], hidden[run], own.rows, own.biases)
            else:
                out[run].index_copy_(1, own.ids, ops.linear(hidden[run], own.rows, own.biases))


def with_vocabularies(
    ops: Operations,
    outputs: torch.Tensor,
    hidden: torch.Tensor,
    segments: Sequence[Segment],
    scale: float,
    soft_cap: float,
) -> Scored:
    """The logits [n, vocab_size] of outputs of the lm head and of hidden [n, hidden], and whether they are finite [n].
    The vocabulary is the largest one of the adapters; tokens that a row's adapter does not have get -inf."""
    vocab_size = outputs.shape[1]
    owned = [(segment, own) for segment in segments if (own := segment.adapter.own.head) is not None]
    widest = max((own.vocab_size for _, own in owned), default=0)
    logits, finite = ops.upcast(outputs, scale, soft_cap, widest)
    for segment, own in owned:
        run = slice(segment.start, segment.stop)
        if own.added is not None:
            added, their_finite = ops.upcast(ops.linear(hidden[run], own.added, own.added_biases), scale, soft_cap)
            logits[run, vocab_size : vocab_size + added.shape[1]] = added
            finite[run] &= their_finite
        logits[run, own.vocab_size :] = -torch.inf
    return logits, finite
