"""Tokens of a step, with what was requested of them, and how a StepResponse lists them.

Tensors are on their way to the host until the step's Mark has been waited for (device/copies.py): `describe` starts
that, on the step's thread, and `add_...` reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loraplex_protos.shard_pb2 import StepResponse
from loraplex_shard.device.copies import to_host
from loraplex_shard.sampling import sampler
from loraplex_shard.stepping.lineup import Ints
from loraplex_shard.stepping.rows import spans


@dataclass(frozen=True, slots=True)
class Alternatives:
    """The counts[i] first of each row."""

    counts: Ints
    ids: Tensor  # [n, most], best first
    logprobs: Tensor

    def of(self, chosen: NDArray[np.bool_]) -> "Alternatives":
        return Alternatives(self.counts[chosen], self.ids[chosen], self.logprobs[chosen])

    def read(self) -> tuple[Ints, NDArray[np.float32]]:
        """The ids and the logprobs of all of them, one token after the other."""
        listed = np.arange(self.ids.shape[1]) < self.counts[:, None]
        return self.ids.numpy()[listed], self.logprobs.numpy()[listed]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens to report, with logprobs and alternatives if requested."""

    places: Ints  # of each token's chunk in the plan
    ids: Tensor
    logprobs: Tensor | None = None
    alternatives: Alternatives | None = None

    def of(self, chosen: NDArray[np.bool_]) -> "Tokens":
        """Some of them."""
        logprobs = None if self.logprobs is None else self.logprobs[chosen]
        alternatives = None if self.alternatives is None else self.alternatives.of(chosen)
        return Tokens(self.places[chosen], self.ids[chosen], logprobs, alternatives)


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """What is reported of prompt tokens [n]."""

    logprobs: Tensor
    ranks: Tensor
    alternatives: Alternatives | None


def describe(places: Ints, ids: Tensor, logits: Tensor, detail: NDArray[np.void]) -> Tokens:
    """Tokens [n] that follow positions with the logits [n, vocab]; detail [n] is what their sequences requested."""
    logprobs = alternatives = None
    scored, listed = detail["logprobs"].any(), detail["top_logprobs"].any()
    if scored or listed:
        totals = sampler.totals(logits)
        logprobs = to_host(sampler.logprobs(logits, ids, totals)) if scored else None
        alternatives = _alternatives(detail["top_logprobs"], logits, totals) if listed else None
    return Tokens(places, to_host(ids), logprobs, alternatives)


def describe_prompt(ids: Tensor, logits: Tensor, alternatives: Ints | None) -> PromptTokens:
    """Prompt tokens [n] that follow positions with the logits [n, vocab], with `alternatives[i]` alternatives for token
    i; None if no token in the plan has any."""
    totals = sampler.totals(logits)
    return PromptTokens(
        to_host(sampler.logprobs(logits, ids, totals)),
        to_host(sampler.ranks(logits, ids)),
        None if alternatives is None else _alternatives(alternatives, logits, totals),
    )


def _alternatives(wanted: Ints, logits: Tensor, totals: Tensor) -> Alternatives:
    """The wanted[i] likeliest tokens of each row of the logits [n, vocab]."""
    counts = np.minimum(wanted, logits.shape[-1])
    likeliest, values = sampler.likeliest(logits, max(1, int(counts.max())), totals)
    return Alternatives(counts, to_host(likeliest), to_host(values))


def add_prompt(response: StepResponse, tokens: PromptTokens) -> None:
    response.prompt_logprobs.extend(tokens.logprobs.tolist())
    response.prompt_ranks.extend(tokens.ranks.tolist())
    if tokens.alternatives is not None:
        ids, logprobs = tokens.alternatives.read()
        response.prompt_alternative_counts.extend(tokens.alternatives.counts.tolist())
        response.prompt_alternative_tokens.extend(ids.tolist())
        response.prompt_alternative_logprobs.extend(logprobs.tolist())


def add_tokens(response: StepResponse, chunks: int, parts: Sequence[Tokens]) -> None:
    """Adds the tokens of a plan of this many chunks. Within a chunk, tokens of earlier parts come first."""
    places = _joined([part.places for part in parts]) if parts else np.zeros(0, np.int64)
    response.token_counts.extend(np.bincount(places, minlength=chunks).tolist())
    if not len(places):
        return
    order = np.argsort(places, kind="stable")
    response.tokens.extend(_joined([part.ids.numpy() for part in parts])[order].tolist())
    if any(part.logprobs is not None for part in parts):
        columns = [np.zeros(len(part.ids)) if part.logprobs is None else part.logprobs.numpy() for part in parts]
        response.logprobs.extend(_joined(columns)[order].tolist())
    if any(part.alternatives is not None for part in parts):
        _add_alternatives(response, parts, order)


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One after the other; a single one is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _add_alternatives(response: StepResponse, parts: Sequence[Tokens], order: Ints) -> None:
    counts = np.concatenate(
        [np.zeros(len(part.ids), np.int64) if part.alternatives is None else part.alternatives.counts for part in parts]
    )
    picked = spans((np.cumsum(counts) - counts)[order], counts[order])
    ids, values = zip(*(part.alternatives.read() for part in parts if part.alternatives is not None), strict=True)
    response.alternative_counts.extend(counts[order].tolist())
    response.alternative_tokens.extend(np.concatenate(ids)[picked].tolist())
    response.alternative_logprobs.extend(np.concatenate(values)[picked].tolist())
