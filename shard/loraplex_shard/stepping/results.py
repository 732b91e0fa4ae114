"""Writes the tokens of a step into its StepResponse, independent of how they were chosen."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_protos.shard_pb2 import StepResponse
from loraplex_shard.sampling import sampler
from loraplex_shard.stepping.rows import Ints, spans

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Alternatives:
    counts: Ints  # of each token
    ids: Ints  # of all of them, best first
    logprobs: Floats


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens to report, with logprobs and alternatives if requested."""

    places: Ints  # of each token's chunk in the plan
    ids: Ints
    logprobs: Floats | None = None
    alternatives: Alternatives | None = None


def describe(places: Ints, ids: Tensor, logits: Tensor, detail: NDArray[np.void]) -> Tokens:
    """Tokens [n] that follow positions with the logits [n, vocab]; detail [n] is what their sequences requested."""
    logprobs = alternatives = None
    if detail["logprobs"].any():
        logprobs = sampler.logprobs(logits, ids).cpu().numpy()
    if detail["top_logprobs"].any():
        alternatives = _alternatives(detail["top_logprobs"], logits)
    return Tokens(places, ids.cpu().numpy(), logprobs, alternatives)


def _alternatives(wanted: Ints, logits: Tensor) -> Alternatives:
    """The wanted[i] likeliest tokens of each row of the logits [n, vocab]."""
    counts = np.minimum(wanted, logits.shape[-1])
    likeliest, values = sampler.likeliest(logits, max(1, int(counts.max())))
    listed = torch.from_numpy(np.arange(likeliest.shape[1]) < counts[:, None])
    return Alternatives(counts, likeliest.cpu()[listed].numpy(), values.cpu()[listed].numpy())


def add_prompt(response: StepResponse, ids: Tensor, logits: Tensor, alternatives: Ints | None) -> None:
    """Adds the log probabilities and ranks of prompt tokens [n] that follow positions with the logits [n, vocab], and
    `alternatives[i]` alternatives for token i; None if no token in the plan has any."""
    response.prompt_logprobs.extend(sampler.logprobs(logits, ids).tolist())
    response.prompt_ranks.extend(sampler.ranks(logits, ids).tolist())
    if alternatives is not None:
        found = _alternatives(alternatives, logits)
        response.prompt_alternative_counts.extend(found.counts.tolist())
        response.prompt_alternative_tokens.extend(found.ids.tolist())
        response.prompt_alternative_logprobs.extend(found.logprobs.tolist())


def add_tokens(response: StepResponse, chunks: int, parts: Sequence[Tokens]) -> None:
    """Adds the tokens of a plan of this many chunks. Within a chunk, tokens of earlier parts come first."""
    places = np.concatenate([part.places for part in parts]) if parts else np.zeros(0, np.int64)
    order = np.argsort(places, kind="stable")
    response.token_counts.extend(np.bincount(places, minlength=chunks).tolist())
    if not len(places):
        return
    response.tokens.extend(np.concatenate([part.ids for part in parts])[order].tolist())
    if any(part.logprobs is not None for part in parts):
        columns = [np.zeros(len(part.ids)) if part.logprobs is None else part.logprobs for part in parts]
        response.logprobs.extend(np.concatenate(columns)[order].tolist())
    if any(part.alternatives is not None for part in parts):
        _add_alternatives(response, parts, order)


def _add_alternatives(response: StepResponse, parts: Sequence[Tokens], order: Ints) -> None:
    nothing, found = np.zeros(0), [part.alternatives for part in parts]
    counts = np.concatenate(
        [np.zeros(len(part.ids), np.int64) if part.alternatives is None else part.alternatives.counts for part in parts]
    )
    picked = spans((np.cumsum(counts) - counts)[order], counts[order])
    ids = np.concatenate([nothing.astype(np.int64) if some is None else some.ids for some in found])
    values = np.concatenate([nothing if some is None else some.logprobs for some in found])
    response.alternative_counts.extend(counts[order].tolist())
    response.alternative_tokens.extend(ids[picked].tolist())
    response.alternative_logprobs.extend(values[picked].tolist())
