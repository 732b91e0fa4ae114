"""Chooses the next token of many sequences at once. A sequence's choice does not depend on its neighbours.

Parameters are columns on the host: they decide which stages run, and on which rows, without asking the device.
Penalties need no state of their own; they are counted from the tokens. Knows nothing of chunks, plans or ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# One field per sampling parameter, named as in the plan.
PARAMETERS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float32),
        ("typical_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("seed", np.uint64),
    ]
)

# How many of the likeliest tokens are looked at before the whole vocabulary is.
HEAD = 512
# Tokens of a strand, whose largest logit or sum stands for it while the strands are searched.
STRAND = 16

# The least normal float32: below it, devices may take a number for 0.
LEAST = float(np.finfo(np.float32).tiny)

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)

# Takes the logits of some rows and columns [rows, 1] of their parameters; returns the changed logits.
Stage = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class History:
    """The sequences' tokens so far. Sequence i's are tokens[rows[i], :lengths[i]], its prompt's come first."""

    tokens: Tensor  # [rows, positions] int32
    rows: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def select(self, chosen: NDArray[np.bool_]) -> "History":
        return History(self.tokens, self.rows[chosen], self.prompt_lengths[chosen], self.lengths[chosen])


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

    logits: [n, vocab] float32, left as they are. parameters: [n] records of PARAMETERS. Penalties, temperature,
    top_k, top_p, min_p and typical_p apply in this order. A row that holds NaN yields some valid token.
    """
    logits = _penalized(logits, parameters, history)
    index = np.flatnonzero(parameters["temperature"] > 0)
    if not len(index):
        return _likeliest_one(logits)
    outputs = history.lengths[index] - history.prompt_lengths[index]
    drawn = _sample(_rows(logits, index), parameters[index], uniforms(parameters["seed"][index], outputs))
    return drawn if len(index) == len(logits) else _likeliest_one(logits).index_copy_(0, _on(index, logits), drawn)


def logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log probability [n] of each row's token [n]."""
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row, best first, and their log probabilities: [n, count] each."""
    values, tokens = _largest(logits, count)
    return tokens, values - logits.logsumexp(-1, keepdim=True)


def warped(logits: Tensor, parameters: NDArray[np.void]) -> Tensor:
    """Logits with temperature applied and -inf for the tokens that are out. All temperatures are above 0."""
    logits = _by_temperature(logits, parameters)
    for stage, name, neutral in (
        (_keep_top_k, "top_k", 0),
        (_keep_top_p, "top_p", 1),
        (_keep_min_p, "min_p", 0),
        (_keep_typical, "typical_p", 1),
    ):
        logits = _apply(stage, logits, parameters[name] != neutral, parameters[name])
    return logits


def head(logits: Tensor, parameters: NDArray[np.void]) -> tuple[Tensor, Tensor, Tensor]:
    """What `warped` leaves of the HEAD likeliest tokens, without a look at the others wherever there is a top_k.

    Returns their logits, but for a constant, and ids, [n, HEAD] each, and whether all other tokens are out [n]. Only
    then is it the whole of what is left.
    """
    top_k, top_p, min_p = (parameters[name] for name in ("top_k", "top_p", "min_p"))
    values, tokens = _largest(logits, min(HEAD, logits.shape[-1]))
    values = _apply(_keep_top_k, _by_temperature(values, parameters), top_k != 0, top_k)
    totals = values.logsumexp(-1, keepdim=True)
    if (top_k == 0).any():
        all_totals = _by_temperature(logits, parameters).logsumexp(-1, keepdim=True)
        totals = torch.where(_on_device(top_k, logits) == 0, all_totals, totals)
    values = _apply(_keep_top_p_of_logprobs, values - totals, top_p != 1, top_p)
    values = _apply(_keep_min_p, values, min_p != 0, min_p)
    # These stages keep what equals the least that they keep. So if the last of the head is out, the rest is.
    whole = values[:, -1].isneginf() | (values.shape[-1] == logits.shape[-1])
    return _apply(_keep_typical, values, parameters["typical_p"] != 1, parameters["typical_p"]), tokens, whole


def uniforms(seeds: NDArray[np.uint64], counters: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each (seed, counter): output `counter` of the splitmix64 generator (Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", 2014) whose state is the mixed seed."""
    states = _mix(seeds) + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN_GAMMA
    # 52 bits, so that the product with a sum near 1 still rounds to less than the sum.
    return (_mix(states) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _sample(logits: Tensor, parameters: NDArray[np.void], uniform: NDArray[np.float64]) -> Tensor:
    """Draws a token from each row: from its head where that is all that is left. It depends on the row alone."""
    drawn = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    wide = (parameters["top_k"] == 0) & (parameters["top_p"] == 1) & (parameters["min_p"] == 0)
    if not wide.all():
        index = np.flatnonzero(~wide)
        values, tokens, whole = head(_rows(logits, index), parameters[index])
        places = _draw(values, uniform[index])
        drawn[_on(index, logits)] = tokens.gather(-1, places[:, None])[:, 0]
        wide[index] = ~whole.cpu().numpy()
    if wide.any():
        index = np.flatnonzero(wide)
        drawn[_on(index, logits)] = _draw(warped(_rows(logits, index), parameters[index]), uniform[index])
    return drawn


def _rows(tensor: Tensor, index: NDArray[np.int64]) -> Tensor:
    """Some of its rows; without a copy if that is all of them."""
    return tensor if len(index) == len(tensor) else tensor[_on(index, tensor)]


def _on(index: NDArray[np.int64], tensor: Tensor) -> Tensor:
    return torch.from_numpy(index).to(tensor.device)


def _likeliest_one(logits: Tensor) -> Tensor:
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))  # a tenth of the time of torch's
    return logits.argmax(-1)


def _strands(tensor: Tensor, padding: float) -> Tensor:
    """[n, vocab] -> [n, STRAND, strands], without a copy where that comes out even."""
    count = -(-tensor.shape[-1] // STRAND)
    short = count * STRAND - tensor.shape[-1]
    return (F.pad(tensor, (0, short), value=padding) if short else tensor).view(len(tensor), STRAND, count)


def _of_strands(strands: Tensor, chosen: Tensor) -> Tensor:
    """All tokens of the chosen ones [n, count]: [n, STRAND, count]."""
    return strands.gather(2, chosen[:, None].expand(-1, STRAND, -1))


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """topk of each row, sorted, with a search of few tokens: it lies in the `count` strands with the largest ones."""
    strands = _strands(logits, -torch.inf)
    if count >= strands.shape[-1]:
        best = logits.topk(count)
        return best.values, best.indices
    chosen = strands.amax(1).topk(count, sorted=False).indices
    best = _of_strands(strands, chosen).flatten(1).topk(count)
    return best.values, best.indices // count * strands.shape[-1] + chosen.gather(1, best.indices % count)


def _draw(logits: Tensor, uniform: NDArray[np.float64]) -> Tensor:
    """Inverts each row's cumulative distribution at its number: [n] int64, never a token whose logit is -inf.

    First that of the strands, then that of the tokens of the one which was found.
    """
    weights = _strands(logits.softmax(-1), 0)
    cumulative = weights.sum(1).cumsum(-1, dtype=torch.float64)
    targets = torch.from_numpy(uniform).to(logits.device)[:, None] * cumulative[:, -1:]
    # Beyond the end only if the row held NaN.
    strand = torch.searchsorted(cumulative, targets, right=True).clamp_(max=cumulative.shape[-1] - 1)
    inside = _of_strands(weights, strand)[:, :, 0]
    sums = inside.cumsum(-1, dtype=torch.float64)
    before = cumulative.gather(-1, strand) - sums[:, -1:]
    place = torch.searchsorted(sums, (targets - before).clamp_(min=0), right=True)
    # Rounding may leave the target at the end of the strand: then it is the last token that can be drawn.
    last = torch.where(inside > 0, torch.arange(STRAND, device=inside.device), 0).amax(-1, keepdim=True)
    return (torch.minimum(place, last) * weights.shape[-1] + strand)[:, 0].clamp_(max=logits.shape[-1] - 1)


def _apply(stage: Stage, logits: Tensor, needed: NDArray[np.bool_], *columns: NDArray[np.generic]) -> Tensor:
    """The logits with a stage applied to the rows that need it; the others keep their bits."""
    if not needed.any():
        return logits
    if needed.all():
        return stage(logits, *(_on_device(column, logits) for column in columns))
    index = torch.from_numpy(np.flatnonzero(needed)).to(logits.device)
    changed = stage(logits[index], *(_on_device(column[needed], logits) for column in columns))
    return logits.index_copy(0, index, changed)


def _on_device(column: NDArray[np.generic], logits: Tensor) -> Tensor:
    # A copy, since torch does not take the strides of a record's field.
    return torch.from_numpy(column.copy()).to(logits.device)[:, None]


def _penalized(logits: Tensor, parameters: NDArray[np.void], history: History) -> Tensor:
    repetition, frequency, presence = (
        parameters[f"{name}_penalty"] for name in ("repetition", "frequency", "presence")
    )
    if (needed := repetition != 1).any():
        counts = _counts(history.select(needed), logits, of_prompt=True)
        logits = _apply(partial(_divide_repeated, counts), logits, needed, repetition)
    if (needed := (frequency != 0) | (presence != 0)).any():
        counts = _counts(history.select(needed), logits, of_prompt=False)
        logits = _apply(partial(_subtract_counted, counts), logits, needed, frequency, presence)
    return logits


def _divide_repeated(counts: Tensor, logits: Tensor, penalty: Tensor) -> Tensor:
    """Makes what occurred less likely (CTRL, arXiv 1909.05858). No penalty is so far from 1 that the result is not
    finite, or not a number."""
    penalty, most = penalty.clamp(min=LEAST), torch.finfo(logits.dtype).max
    divided = torch.where(logits > 0, logits / penalty, logits * penalty)
    # What a grammar forbids stays so.
    return torch.where((counts > 0) & logits.isfinite(), divided.clamp_(-most, most), logits)


def _subtract_counted(counts: Tensor, logits: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    return logits - frequency * counts - presence * (counts > 0)


def _counts(history: History, logits: Tensor, of_prompt: bool) -> Tensor:
    """How often each token occurs in each sequence's output, or in prompt and output: [n, vocab] float32."""
    longest = int(history.lengths.max())
    tokens = history.tokens[torch.from_numpy(history.rows).to(logits.device), :longest]
    positions = torch.arange(longest, device=logits.device)
    inside = positions < _on_device(history.lengths, logits)
    if not of_prompt:
        inside &= positions >= _on_device(history.prompt_lengths, logits)
    # What lies outside may be uninitialised: it counts 0 times as token 0.
    tokens = torch.where(inside, tokens, 0).long()
    counts = logits.new_zeros((len(history.rows), logits.shape[-1]))
    return counts.scatter_add_(1, tokens, inside.to(counts.dtype))


def _by_temperature(logits: Tensor, parameters: NDArray[np.void]) -> Tensor:
    # Relative to the largest, so that a tiny temperature overflows to -inf only.
    temperature = _on_device(parameters["temperature"], logits).clamp_(min=LEAST)
    return (logits - logits.amax(-1, keepdim=True)).div_(temperature)


def _keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keeps the k likeliest tokens, and what equals the last of them."""
    k = k.clamp(max=logits.shape[-1])
    best = logits.topk(int(k.max())).values
    return logits.masked_fill(logits < best.gather(-1, k - 1), -torch.inf)


def _keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keeps the likeliest tokens that add up to p (nucleus sampling, arXiv 1904.09751)."""
    return _keep_mass(logits, logits.softmax(-1), -logits, p)


def _keep_top_p_of_logprobs(logprobs: Tensor, p: Tensor) -> Tensor:
    """The same where the rows are some tokens of a distribution, by their log probabilities in it."""
    return _keep_mass(logprobs, logprobs.exp(), -logprobs, p)


def _keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keeps what has at least p times the probability of the likeliest (arXiv 2407.01082)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + p.log(), -torch.inf)


def _keep_typical(logits: Tensor, p: Tensor) -> Tensor:
    """Keeps the tokens whose surprise is nearest to the expected one and that add up to p (arXiv 2202.00666)."""
    surprise = -logits.log_softmax(-1)
    probabilities = (-surprise).exp()
    expected = torch.special.entr(probabilities).sum(-1, keepdim=True)
    return _keep_mass(logits, probabilities, (surprise - expected).abs(), p)


def _keep_mass(logits: Tensor, probabilities: Tensor, order: Tensor, mass: Tensor) -> Tensor:
    """Keeps the tokens of the least `order` whose probabilities add up to mass, and what equals the last of them."""
    vocab = logits.shape[-1]
    for size in (min(HEAD, vocab), vocab):
        first = order.topk(size, largest=False)
        cumulative = probabilities.gather(-1, first.indices).cumsum(-1, dtype=torch.float64)
        if bool((cumulative[:, -1:] >= mass).all()):
            break
    last = (cumulative < mass).sum(-1, keepdim=True).clamp_(max=size - 1)
    return logits.masked_fill(order > first.values.gather(-1, last), -torch.inf)
