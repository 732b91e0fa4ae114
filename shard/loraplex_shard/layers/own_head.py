"""Logits of adapters with their own rows of the lm head, and maybe with another vocabulary than the model's."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from loraplex_shard.shapes.batch import Segment

Scored = tuple[torch.Tensor, torch.Tensor]


def put_own_logits(out: torch.Tensor, hidden: torch.Tensor, segments: Sequence[Segment]) -> None:
    """Returns out [n, this rank's outputs of the lm head] of hidden [n, hidden], with adapters' own outputs in place of
    the base's."""
    for segment in segments:
        own = segment.adapter.own.head
        if own is not None and len(own.ids):
            run = slice(segment.start, segment.stop)
            out[run] = out[run].index_copy(1, own.ids, F.linear(hidden[run], own.rows, own.biases))


def with_vocabularies(
    scored: Scored, hidden: torch.Tensor, segments: Sequence[Segment], upcast: Callable[[torch.Tensor], Scored]
) -> Scored:
    """The logits [n, vocab_size] of hidden [n, hidden], and whether they are finite [n]. The vocabulary is the largest
    one of the adapters; tokens that a row's adapter does not have get -inf. `upcast` turns outputs of the lm head into
    logits."""
    owned = [segment for segment in segments if segment.adapter.own.head is not None]
    if not owned:
        return scored
    logits, finite = scored
    vocab_size = logits.shape[1]
    widest = max(vocab_size, *(_vocab_size(segment) for segment in owned))
    wide = logits.new_full((len(logits), widest), -torch.inf)
    wide[:, :vocab_size] = logits
    for segment in owned:
        run, own = slice(segment.start, segment.stop), segment.adapter.own.head
        assert own is not None
        if len(own.added):
            added, their_finite = upcast(F.linear(hidden[run], own.added, own.added_biases))
            wide[run, vocab_size : vocab_size + len(own.added)] = added
            finite[run] &= their_finite
        wide[run, own.vocab_size :] = -torch.inf
    return wide, finite


def _vocab_size(segment: Segment) -> int:
    own = segment.adapter.own.head
    return 0 if own is None else own.vocab_size
