"""The stages of sampling: what each does, by which parameters, and which values of them leave it out. Which rows need a
stage follows from that."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_protos.generation_pb2 import Sampling
from loraplex_shard.device import copies
from loraplex_shard.sampling.few_rows import by_rows

Column = NDArray[Any]  # [n, 1]

# How many of the likeliest tokens are looked at before the whole vocabulary is.
HEAD = 512

# Bits of a float that are looked at together.
DIGIT = 16

# The least normal float32: below it, devices may take a number for 0.
LEAST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class History:
    """The sequences' tokens so far. Sequence i's are tokens[rows[i], :lengths[i]], its prompt's come first."""

    tokens: Tensor  # [rows, positions] int32
    rows: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def select(self, chosen: NDArray[np.int64]) -> "History":
        return History(self.tokens, self.rows[chosen], self.prompt_lengths[chosen], self.lengths[chosen])

    def counts(self, logits: Tensor, of_prompt: bool) -> Tensor:
        """How often each token occurs in each sequence's output, or in prompt and output: [n, vocab], as the logits."""
        longest = int(self.lengths.max())
        columns = self.rows, self.lengths[:, None], self.prompt_lengths[:, None]
        rows, lengths, prompt_lengths = copies.to_device(columns, logits.device)
        tokens = self.tokens[rows, :longest]
        positions = torch.arange(longest, device=logits.device)
        inside = positions < lengths
        if not of_prompt:
            inside &= positions >= prompt_lengths
        # What lies outside may be uninitialised: it counts 0 times as token 0.
        tokens = torch.where(inside, tokens, 0).long()
        counts = logits.new_zeros((len(self.rows), logits.shape[-1]))
        return counts.scatter_add_(1, tokens, inside.to(counts.dtype))


class Stage:
    """A step of sampling.

    `function` takes the logits [n, vocab] of some rows, their history if it comes before temperature, and of each
    parameter a column [n, 1], on the host; it returns the changed logits. `neutral` are the parameters, with the values
    that leave it out.
    """

    def __init__(self, function: Callable[..., Tensor], **neutral: float) -> None:
        self._function = function
        self.neutral = neutral

    def needed(self, parameters: NDArray[np.void]) -> NDArray[np.bool_]:
        """Which rows it changes: [n]."""
        changes = [parameters[name] != value for name, value in self.neutral.items()]
        needed: NDArray[np.bool_] = np.any(changes, axis=0)
        return needed

    def apply(self, logits: Tensor, parameters: NDArray[np.void], history: History | None = None) -> Tensor:
        """The logits with it applied to the rows that need it; the others keep their bits."""
        index = np.flatnonzero(self.needed(parameters))
        if not len(index):
            return logits
        past = [history.select(index)] if history else []
        columns = (parameters[name][index, None] for name in self.neutral)
        changed = self._function(select(logits, index), *past, *columns)
        return changed if len(index) == len(logits) else logits.index_copy(0, to_device(index, logits), changed)


def select(tensor: Tensor, index: NDArray[np.int64]) -> Tensor:
    """Some of its rows, in their order; without a copy if that is all of them."""
    return tensor if len(index) == len(tensor) else tensor[to_device(index, tensor)]


def to_device(index: NDArray[Any], tensor: Tensor) -> Tensor:
    """On the tensor's device."""
    return copies.to_device([index], tensor.device)[0]


def by_temperature(logits: Tensor, parameters: NDArray[np.void]) -> Tensor:
    """Relative to the largest, so that a tiny temperature overflows to -inf only."""
    temperature = to_device(np.maximum(parameters["temperature"], LEAST)[:, None], logits)
    return (logits - logits.amax(-1, keepdim=True)).div_(temperature)


def _divide_repeated(logits: Tensor, history: History, penalties: Column) -> Tensor:
    """Makes what occurred less likely (CTRL, arXiv 1909.05858). No penalty is so far from 1 that the result is not
    finite, or not a number."""
    penalty, most = to_device(np.maximum(penalties, LEAST), logits), torch.finfo(logits.dtype).max
    divided = torch.where(logits > 0, logits / penalty, logits * penalty)
    # What a grammar forbids stays so.
    occurred = (history.counts(logits, of_prompt=True) > 0) & logits.isfinite()
    return torch.where(occurred, divided.clamp_(-most, most), logits)


def _subtract_counted(logits: Tensor, history: History, *penalties: Column) -> Tensor:
    frequency, presence = copies.to_device(penalties, logits.device)
    counts = history.counts(logits, of_prompt=False)
    return logits - frequency * counts - presence * (counts > 0)


def _keep_sigmas(logits: Tensor, _: History, counts: Column) -> Tensor:
    """Keeps what is at most so many standard deviations below the largest (arXiv 2411.07641), as llama.cpp does: of the
    logits that a grammar allows."""
    allowed = logits > -torch.inf
    total = allowed.sum(-1, keepdim=True)
    mean = logits.masked_fill(~allowed, 0).sum(-1, keepdim=True) / total
    deviation = ((logits - mean).masked_fill(~allowed, 0).square().sum(-1, keepdim=True) / total).sqrt()
    least = logits.amax(-1, keepdim=True) - to_device(counts, logits) * deviation
    return logits.masked_fill(logits < least, -torch.inf)


def _keep_top_k(logits: Tensor, k: Column) -> Tensor:
    """Keeps the k likeliest tokens, and what equals the last of them."""
    k = np.minimum(k, logits.shape[-1])
    if k.max() > HEAD:
        return _keep_mass(logits, torch.ones_like(logits), -logits, k)
    best = logits.topk(int(k.max())).values
    return logits.masked_fill(logits < best.gather(-1, to_device(k - 1, logits)), -torch.inf)


def _keep_top_p(logits: Tensor, p: Column) -> Tensor:
    """Keeps the likeliest tokens that add up to p (nucleus sampling, arXiv 1904.09751)."""
    return _keep_mass(logits, logits.softmax(-1), -logits, p)


def _keep_top_p_of_logprobs(logprobs: Tensor, p: Column) -> Tensor:
    """The same where the rows are some tokens of a distribution, by their log probabilities in it."""
    return _keep_mass(logprobs, logprobs.exp(), -logprobs, p)


def _keep_min_p(logits: Tensor, p: Column) -> Tensor:
    """Keeps what has at least p times the probability of the likeliest (arXiv 2407.01082)."""
    least = logits.amax(-1, keepdim=True) + to_device(p, logits).log()
    return logits.masked_fill(logits < least, -torch.inf)


def _keep_typical(logits: Tensor, p: Column) -> Tensor:
    """Keeps the tokens whose surprise is nearest to the expected one and that add up to p (arXiv 2202.00666)."""
    surprise = -logits.log_softmax(-1)
    probabilities = (-surprise).exp()
    expected = torch.special.entr(probabilities).sum(-1, keepdim=True)
    return _keep_mass(logits, probabilities, (surprise - expected).abs(), p)


def _keep_mass(logits: Tensor, weights: Tensor, order: Tensor, masses: Column) -> Tensor:
    """Keeps the tokens of the least `order`, which is not negative, whose weights add up to a mass, and what equals the
    last of them."""
    mass = to_device(masses, logits).double()
    size = min(HEAD, order.shape[-1])
    first = order.topk(size, largest=False)
    cumulative = weights.gather(-1, first.indices).cumsum(-1, dtype=torch.float64)
    if size == order.shape[-1] or bool((cumulative[:, -1:] >= mass).all()):
        most = first.values.gather(-1, torch.searchsorted(cumulative, mass).clamp_(max=size - 1))
    else:
        most = by_rows(_order_of_mass, weights, order, mass)
    return logits.masked_fill(order > most, -torch.inf)


def _order_of_mass(weights: Tensor, order: Tensor, mass: Tensor) -> Tensor:
    """The least number [n, 1] up to which the weights, by their `order`, add up to the mass; NaN, if all do not.

    Nothing is sorted, which would take several times as long. The bits of a float that is not negative are an integer
    as large as others' are to it: first, its upper digits are found, then the lower ones.
    """
    bits = order.abs().view(torch.int32)  # without the sign of -0
    upper, lower = (bits >> DIGIT).long(), (bits & (1 << DIGIT) - 1).long()
    sums = _sums(weights, upper, 1 << 31 - DIGIT)
    found = torch.searchsorted(sums, mass).clamp_(max=sums.shape[-1] - 1)
    before = torch.where(found > 0, sums.gather(-1, (found - 1).clamp_(min=0)), 0)
    sums = _sums(torch.where(upper == found, weights, 0), lower, 1 << DIGIT)
    last = torch.searchsorted(sums, mass - before).clamp_(max=sums.shape[-1] - 1)
    return (found << DIGIT | last).int().view(torch.float32)


def _sums(weights: Tensor, digits: Tensor, count: int) -> Tensor:
    """What the weights of each digit and of those below it add up to: [n, count]."""
    sums = torch.zeros((len(weights), count), dtype=torch.float64, device=weights.device)
    return sums.scatter_add_(-1, digits, weights.double()).cumsum_(-1)


# In the order in which they apply. These see the whole rows, as the model made them.
BEFORE_TEMPERATURE = (
    Stage(_divide_repeated, repetition_penalty=1.0),
    Stage(_subtract_counted, frequency_penalty=0.0, presence_penalty=0.0),
    Stage(_keep_sigmas, top_n_sigma=0.0),
)
# Then comes temperature. These keep the likeliest tokens, and what equals the last of them.
LIKELIEST = (Stage(_keep_top_k, top_k=0), Stage(_keep_top_p, top_p=1.0), Stage(_keep_min_p, min_p=0.0))
# What follows top_k, of a row's likeliest tokens by their log probabilities in the whole row.
OF_HEAD = (Stage(_keep_top_p_of_logprobs, top_p=1.0), *LIKELIEST[2:])
# These look at all that is left.
OTHERS = (Stage(_keep_typical, typical_p=1.0),)
STAGES = (*BEFORE_TEMPERATURE, *LIKELIEST, *OTHERS)

# By the names of generation.proto, with what an absent one stands for.
NEUTRAL: dict[str, float] = {"temperature": 0.0, "seed": 0}
for stage in STAGES:
    NEUTRAL |= stage.neutral
KINDS = {"seed": np.uint64, "top_k": np.int64}
PARAMETERS = np.dtype([(name, KINDS.get(name, np.float32)) for name in NEUTRAL])


def read_parameters(sampling: Sampling) -> tuple[float, ...]:
    """A record of PARAMETERS."""
    given = {field.name: value for field, value in sampling.ListFields()}
    return tuple(given.get(name, value) for name, value in NEUTRAL.items())
