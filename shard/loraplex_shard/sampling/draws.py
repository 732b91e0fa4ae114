"""Tokens of rows of logits: the likeliest, or one by chance. Rows are searched by strands, whose largest logit or sum
stands for their tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from loraplex_shard.device.copies import to_device

STRAND = 16  # tokens of a strand

Ints = NDArray[np.int64]

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Draws:
    """By what tokens are drawn that temperature, top_k, top_p and min_p alone decide about, as columns for a kernel."""

    numbers: "DrawNumbers"
    outputs: Ints  # how many tokens each sequence has generated

    def columns(self) -> tuple[NDArray[Any], ...]:
        """Temperature, top_k, top_p, the logarithm of min_p, and a number in [0, 1) for each sequence."""
        numbers = self.numbers
        uniform = uniforms(numbers.seeds, self.outputs) if numbers.any else np.zeros(len(self.outputs))
        return *numbers.columns, uniform


class DrawNumbers:
    """The part of it that stays the same from step to step. `parameters`: records of PARAMETERS."""

    def __init__(self, parameters: NDArray[np.void]) -> None:
        temperature, top_k, top_p, min_p, self.seeds = (
            np.ascontiguousarray(parameters[name]) for name in ("temperature", "top_k", "top_p", "min_p", "seed")
        )
        self.any = bool((temperature > 0).any())  # whether anything is left to chance
        self.columns = temperature, top_k, top_p, torch.from_numpy(min_p).log().numpy()


def likeliest_one(logits: Tensor) -> Tensor:
    """argmax of each row: [n], the first among equals."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))  # a tenth of the time of torch's
    return logits.argmax(-1)


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """topk of each row, sorted, with a search of few tokens: it lies in the `count` strands with the largest ones."""
    strands = _strands(logits, -torch.inf)
    if count >= strands.shape[-1]:
        best = logits.topk(count)
        return best.values, best.indices
    chosen = strands.amax(1).topk(count, sorted=False).indices
    best = _of_strands(strands, chosen).flatten(1).topk(count)
    return best.values, best.indices // count * strands.shape[-1] + chosen.gather(1, best.indices % count)


def draw(logits: Tensor, uniform: NDArray[np.float64]) -> Tensor:
    """Inverts each row's cumulative distribution at its number: [n] int64, never a token whose logit is -inf.

    First that of the strands, then that of the tokens of the one which was found.
    """
    weights = _strands(logits.softmax(-1), 0)
    cumulative = weights.sum(1).cumsum(-1, dtype=torch.float64)
    targets = to_device([uniform[:, None]], logits.device)[0] * cumulative[:, -1:]
    # Beyond the end only if the row held NaN.
    strand = torch.searchsorted(cumulative, targets, right=True).clamp_(max=cumulative.shape[-1] - 1)
    inside = _of_strands(weights, strand)[:, :, 0]
    sums = inside.cumsum(-1, dtype=torch.float64)
    before = cumulative.gather(-1, strand) - sums[:, -1:]
    place = torch.searchsorted(sums, (targets - before).clamp_(min=0), right=True)
    # Rounding may leave the target at the end of the strand: then it is the last token that can be drawn.
    last = torch.where(inside > 0, torch.arange(STRAND, device=inside.device), 0).amax(-1, keepdim=True)
    return (torch.minimum(place, last) * weights.shape[-1] + strand)[:, 0].clamp_(max=logits.shape[-1] - 1)


def draw_some(logits: Tensor, tokens: Tensor, vocab: int, uniform: NDArray[np.float64]) -> Tensor:
    """The same for rows of a vocabulary of which only these tokens [n, count] are left, the likeliest first."""
    places = torch.arange(tokens.shape[-1], device=tokens.device)
    most = int(torch.where(logits > -torch.inf, places, 0).amax()) + 1
    logits, tokens, places = logits[:, :most], tokens[:, :most], places[:most]
    strands = -(-vocab // STRAND)
    order = (tokens % strands * STRAND + tokens // strands).argsort(-1)
    weights = logits.softmax(-1).gather(-1, order)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    targets = to_device([uniform[:, None]], logits.device)[0] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, targets, right=True)
    last = torch.where(weights > 0, places, 0).amax(-1, keepdim=True)
    return tokens.gather(-1, order.gather(-1, torch.minimum(place, last)))[:, 0]


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


def _strands(tensor: Tensor, padding: float) -> Tensor:
    """[n, vocab] -> [n, STRAND, strands], without a copy where that comes out even."""
    count = -(-tensor.shape[-1] // STRAND)
    short = count * STRAND - tensor.shape[-1]
    return (F.pad(tensor, (0, short), value=padding) if short else tensor).view(len(tensor), STRAND, count)


def _of_strands(strands: Tensor, chosen: Tensor) -> Tensor:
    """All tokens of the chosen ones [n, count]: [n, STRAND, count]."""
    return strands.gather(2, chosen[:, None].expand(-1, STRAND, -1))
