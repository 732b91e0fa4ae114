"""Writes what a step sampled into its StepResponse. Knows the message's columns, not how tokens were chosen."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_protos.shard_pb2 import StepResponse
from loraplex_shard import sampler
from loraplex_shard.rows import Ints


def add_tokens(
    response: StepResponse, places: Ints, tokens: Tensor, logits: Tensor, failures: Ints, detail: NDArray[np.void]
) -> None:
    """Adds the tokens [n] that were sampled from logits [n, vocab] after the chunks at `places` of the plan.

    failures: [n] FailureReasons, 0 for none. detail: what the sequences of all chunks of the plan asked for.
    """
    good = failures == 0
    counts = np.zeros(len(detail), np.int64)
    counts[places] = good
    response.token_counts.extend(counts.tolist())
    response.tokens.extend(tokens.cpu()[good].tolist())
    response.failed_chunks.extend(places[~good].tolist())
    response.failure_reasons.extend(failures[~good].tolist())
    if detail["logprobs"].any():
        response.logprobs.extend(sampler.logprobs(logits, tokens).cpu()[good].tolist())
    if detail["top_logprobs"].any():
        wanted = np.minimum(detail["top_logprobs"][places], logits.shape[-1]) * good
        ids, values = sampler.likeliest(logits, int(wanted.max()))
        listed = torch.from_numpy(np.arange(ids.shape[1]) < wanted[:, None])
        response.alternative_counts.extend(wanted[good].tolist())
        response.alternative_tokens.extend(ids.cpu()[listed].tolist())
        response.alternative_logprobs.extend(values.cpu()[listed].tolist())


def add_forced(response: StepResponse, places: Ints, forced: Ints) -> None:
    """Puts what grammars force [n, most], padded with -1, behind the tokens sampled at `places` of the plan."""
    if not (forced >= 0).any():
        return
    counts = np.array(response.token_counts)
    counts[places] += (forced >= 0).sum(1)
    sampled = np.array(response.tokens)[:, None]
    tokens = np.concatenate((sampled, forced), axis=1)
    kept = tokens >= 0
    response.token_counts[:] = counts.tolist()
    response.tokens[:] = tokens[kept].tolist()
    if response.logprobs:
        logprobs = np.zeros(tokens.shape)
        logprobs[:, 0] = response.logprobs
        response.logprobs[:] = logprobs[kept].tolist()
    if response.alternative_counts:
        alternatives = np.zeros(tokens.shape, np.int64)
        alternatives[:, 0] = response.alternative_counts
        response.alternative_counts[:] = alternatives[kept].tolist()
