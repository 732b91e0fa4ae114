"""Chooses the next token of many sequences at once. A sequence's choice does not depend on its neighbours.

Parameters are columns on the host: they decide which stages run, and on which rows, without asking the device.
Penalties need no state of their own; they are counted from the tokens. Knows nothing of chunks, plans or ranks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_shard.sampling.draws import draw, draw_some, largest, likeliest_one, uniforms
from loraplex_shard.sampling.few_rows import by_rows
from loraplex_shard.sampling.stages import (
    BEFORE_TEMPERATURE,
    HEAD,
    LIKELIEST,
    OF_HEAD,
    OTHERS,
    History,
    by_temperature,
    select,
    to_device,
)


@dataclass(frozen=True, slots=True)
class Bias:
    """values[i] is to be added to the logit of token tokens[i] in row rows[i]."""

    rows: Tensor
    tokens: Tensor
    values: Tensor

    def apply(self, logits: Tensor) -> Tensor:
        """A copy of the logits [n, vocab] with it."""
        return logits.index_put((self.rows, self.tokens), self.values.to(logits.dtype), accumulate=True)


def sample(logits: Tensor, parameters: NDArray[np.void], history: History) -> Tensor:
    """The next token of each sequence: [n] int64. Where temperature is 0 the likeliest, the first among equals.

    logits: [n, vocab] float32, left as they are. parameters: [n] records of PARAMETERS. The stages apply in the order
    of stages.py. A row that holds NaN yields some valid token.
    """
    for stage in BEFORE_TEMPERATURE:
        logits = stage.apply(logits, parameters, history)
    index = np.flatnonzero(parameters["temperature"] > 0)
    if not len(index):
        return likeliest_one(logits)
    outputs = history.lengths[index] - history.prompt_lengths[index]
    drawn = _sample(select(logits, index), parameters[index], uniforms(parameters["seed"][index], outputs))
    return drawn if len(index) == len(logits) else likeliest_one(logits).index_copy_(0, to_device(index, logits), drawn)


def are_drawn_at_once(parameters: NDArray[np.void]) -> bool:
    """Whether Draws have all that decides about the tokens of these rows."""
    return not any(stage.needed(parameters).any() for stage in (*BEFORE_TEMPERATURE, *OTHERS))


def totals(logits: Tensor) -> Tensor:
    """The logarithm of the sum of each row's exponentials, which log probabilities are relative to: [n, 1]."""
    return by_rows(lambda rows: rows.logsumexp(-1, keepdim=True), logits)


def logprobs(logits: Tensor, tokens: Tensor, totals: Tensor) -> Tensor:
    """The log probability [n] of each row's token [n]."""
    return (logits.gather(-1, tokens[:, None]) - totals)[:, 0]


def ranks(logits: Tensor, tokens: Tensor) -> Tensor:
    """How many tokens of each row are at least as likely as its token [n], which is one of them: [n]."""
    return by_rows(lambda rows, own: (rows >= own).sum(-1), logits, logits.gather(-1, tokens[:, None]))


def likeliest(logits: Tensor, count: int, totals: Tensor) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row, best first, and their log probabilities: [n, count] each."""
    values, tokens = largest(logits, count)
    return tokens, values - totals


def warped(logits: Tensor, parameters: NDArray[np.void]) -> Tensor:
    """Logits with temperature applied and -inf for the tokens that are out. All temperatures are above 0."""
    logits = by_temperature(logits, parameters)
    for stage in (*LIKELIEST, *OTHERS):
        logits = stage.apply(logits, parameters)
    return logits


def head(logits: Tensor, parameters: NDArray[np.void]) -> tuple[Tensor, Tensor, Tensor]:
    """What `warped` leaves of the HEAD likeliest tokens, without a look at the others wherever there is a top_k.

    Returns their logits, but for a constant, and ids, [n, HEAD] each, and whether all other tokens are out [n]. Only
    then is it the whole of what is left.
    """
    values, tokens = largest(logits, min(HEAD, logits.shape[-1]))
    top_k = LIKELIEST[0]
    values = top_k.apply(by_temperature(values, parameters), parameters)
    totals = values.logsumexp(-1, keepdim=True)
    cut = top_k.needed(parameters)
    if not cut.all():
        all_totals = by_temperature(logits, parameters).logsumexp(-1, keepdim=True)
        totals = torch.where(to_device(cut, logits)[:, None], totals, all_totals)
    values = values - totals
    for stage in OF_HEAD:
        values = stage.apply(values, parameters)
    # These stages keep what equals the least that they keep. So if the last of the head is out, the rest is.
    whole = values[:, -1].isneginf() | (values.shape[-1] == logits.shape[-1])
    for stage in OTHERS:
        values = stage.apply(values, parameters)
    return values, tokens, whole


def _sample(logits: Tensor, parameters: NDArray[np.void], uniform: NDArray[np.float64]) -> Tensor:
    """Draws a token from each row. It depends on the row alone."""
    others = np.any([stage.needed(parameters) for stage in OTHERS], axis=0)
    if logits.device.type == "cpu" or others.all():
        return draw_each(logits, parameters, uniform)
    # Triton is installed only with torch for CUDA.
    from loraplex_shard.sampling.cuda import draw as draw_at_once

    if not others.any():
        return draw_at_once(logits, parameters, uniform)
    drawn = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for function, chosen in ((draw_at_once, ~others), (draw_each, others)):
        index = np.flatnonzero(chosen)
        drawn[to_device(index, logits)] = function(select(logits, index), parameters[index], uniform[index])
    return drawn


def draw_each(logits: Tensor, parameters: NDArray[np.void], uniform: NDArray[np.float64]) -> Tensor:
    """Draws a token from each row of logits, whose temperatures are above 0: from its head where that is all that is
    left."""
    drawn = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    wide = ~np.any([stage.needed(parameters) for stage in LIKELIEST], axis=0)
    if not wide.all():
        index = np.flatnonzero(~wide)
        values, tokens, whole = head(select(logits, index), parameters[index])
        drawn[to_device(index, logits)] = draw_some(values, tokens, logits.shape[-1], uniform[index])
        wide[index] = ~whole.cpu().numpy()
    if wide.any():
        index = np.flatnonzero(wide)
        drawn[to_device(index, logits)] = draw(warped(select(logits, index), parameters[index]), uniform[index])
    return drawn
