"""Adapters' own weights outside the linear layers, in plain torch, on any device, one adapter after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from loraplex_shard.ops.base import HeadNorms, Norm
from loraplex_shard.shapes.batch import Batch, Segment
from loraplex_shard.shapes.own_weights import OwnEmbedding


def put_own_embeddings(out: torch.Tensor, batch: Batch) -> None:
    """Replaces the base's embeddings [tokens, hidden] by those of the tokens' adapters, in place."""
    for segment in batch.segments:
        if own := segment.adapter.own.embedding:
            run = slice(segment.start, segment.stop)
            out[run] = _embedded(batch.token_ids[run], out[run], own)


def _embedded(ids: torch.Tensor, base: torch.Tensor, own: OwnEmbedding) -> torch.Tensor:
    wide = base.float() if own.factors is None else base.float() * own.factors
    if len(own.expand):
        wide += own.shrink[ids.clamp(max=len(own.shrink) - 1)].float() @ own.expand.float()
    out = wide.to(base.dtype)
    if len(own.ids):
        places = torch.searchsorted(own.ids, ids).clamp_(max=len(own.ids) - 1)
        out = torch.where((own.ids[places] == ids)[:, None], own.rows[places].to(base.dtype), out)
    return out


def put_own_norms(
    function: Callable[[torch.Tensor, Norm], torch.Tensor],
    out: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    segments: Sequence[Segment],
) -> torch.Tensor:
    """`out` [tokens, n] is the function of x with the base's norm. Replaces, in place, the tokens whose adapters have
    their own norms, and returns it."""
    for segment in segments:
        if own := segment.adapter.own.norms:
            weight, bias = own[norm.index], own[norm.index + 1]
            if weight is not None or bias is not None:
                run = slice(segment.start, segment.stop)
                weight, bias = (norm.weight if weight is None else weight), (norm.bias if bias is None else bias)
                out[run] = function(x[run], replace(norm, weight=weight, bias=bias))
    return out


def norm_runs(norms: HeadNorms, segments: Sequence[Segment], tokens: int) -> Iterator[tuple[slice, HeadNorms]]:
    """A batch's tokens as runs; each run is normalized in the same way."""
    begin = 0
    for segment in segments:
        own = segment.adapter.own.norms
        if own and (weight := own[norms.index]) is not None:
            if begin < segment.start:
                yield _of_run(norms, norms.weight, slice(begin, segment.start))
            yield _of_run(norms, weight, slice(segment.start, segment.stop))
            begin = segment.stop
    if begin < tokens:
        yield _of_run(norms, norms.weight, slice(begin, tokens))


def _of_run(norms: HeadNorms, weight: torch.Tensor, run: slice) -> tuple[slice, HeadNorms]:
    squares = None if norms.squares is None else norms.squares[run]
    return run, replace(norms, weight=weight, squares=squares)


def part_of(batch: Batch, run: slice) -> Batch:
    """A run of a batch's tokens, for operations on each token by itself."""
    return replace(batch, positions=batch.positions[run], cache_indices=batch.cache_indices[run])
