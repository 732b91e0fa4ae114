"""Draws tokens on a GPU in one launch, with a program for each row, and without asking it how many tokens are left.

Nothing is sorted. The tokens that top_k and top_p keep are those up to some distance from the largest logit, and that
is found digit by digit: how many tokens, or how much probability, lie nearer than each of 16 distances? (Like Qrita,
arXiv 2602.01518, and FlashInfer's sampler.)
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from loraplex_shard.device.copies import to_device
from loraplex_shard.sampling.draws import STRAND, DrawNumbers

LANES = 512  # tokens that a program reads at once
STRANDS = 64  # strands that a program reads at once


def draw(logits: torch.Tensor, parameters: NDArray[np.void], uniform: NDArray[np.float64]) -> torch.Tensor:
    """sampler.draw_each for these rows of logits [n, vocab] float32, whose temperatures are above 0, without stages
    that look at all that is left: [n] int64. Sums run in another order: a token whose place is within their rounding
    may be left out, or be drawn, where it is not there."""
    drawn = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    draw_into(drawn, logits, to_device((*DrawNumbers(parameters).columns, uniform), logits.device))
    return drawn


def draw_into(drawn: torch.Tensor, logits: torch.Tensor, columns: Sequence[torch.Tensor]) -> None:
    """The same by columns as Draws has them. Where the temperature is 0, `drawn` [n] stays as it is."""
    temperature, top_k, top_p, log_min_p, uniform = columns
    vocab = logits.shape[1]
    _draw[(len(logits),)](
        logits,
        temperature,
        top_k,
        top_p,
        log_min_p,
        uniform,
        drawn,
        vocab,
        triton.cdiv(vocab, STRAND),
        LANES=LANES,
        STRAND=STRAND,
        STRANDS=STRANDS,
        num_warps=8,
    )


@triton.jit
def _distance(logits, token, within, largest, temperature):
    """How far the tokens' logits are below the largest one, by temperature; infinite if one of them is not finite."""
    distance = (largest - tl.load(logits + token, within, float("-inf"))) / temperature
    return tl.where(distance == distance, distance, float("inf"))


@triton.jit
def _bits(distance):
    """Integers in the order of the distances, which are not negative."""
    return distance.to(tl.int32, bitcast=True)


@triton.jit
def _farthest(logits, vocab, largest, temperature, limit, target, MASS: tl.constexpr, LANES: tl.constexpr):
    """The bits of the distance of the token with which the nearest tokens add up to the target: each of them counts 1
    or, if MASS, exp(-distance) if it is not beyond the limit."""
    low = 0
    digit = tl.arange(0, 16)
    for step in range(8):  # an infinite distance has 31 bits
        shift = tl.maximum(27 - 4 * step, 0)
        pivots = low + (digit << shift)
        sums = tl.zeros([LANES, 16], tl.float32)
        for first in range(0, vocab, LANES):
            token = first + tl.arange(0, LANES)
            distance = _distance(logits, token, token < vocab, largest, temperature)
            bits = _bits(distance)
            weight = tl.exp(-distance) if MASS else 1.0
            weight = tl.where((bits <= limit) & (token < vocab), weight, 0.0)
            sums += tl.where(bits[:, None] < pivots[None, :], weight[:, None], 0.0)
        nearer = tl.sum(sums.to(tl.float64), 0)
        low += (tl.sum((nearer < target).to(tl.int32), 0) - 1) << shift
    return low


@triton.jit
def _weights(logits, token, within, largest, temperature, limit, log_min_p):
    distance = _distance(logits, token, within, largest, temperature)
    return tl.where((_bits(distance) <= limit) & (-distance >= log_min_p), tl.exp(-distance), 0.0)


@triton.jit(do_not_specialize=["vocab", "strands"])
def _draw(
    logits,
    temperatures,
    top_ks,
    top_ps,
    log_min_ps,
    uniforms,
    drawn,
    vocab,
    strands,
    LANES: tl.constexpr,
    STRAND: tl.constexpr,
    STRANDS: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(temperatures + row) <= 0:
        return
    logits += row.to(tl.int64) * vocab
    peaks = tl.full([LANES], float("-inf"), tl.float32)
    for first in range(0, vocab, LANES):
        token = first + tl.arange(0, LANES)
        peaks = tl.maximum(peaks, tl.load(logits + token, token < vocab, float("-inf")))
    largest = tl.max(peaks, 0)
    temperature = tl.maximum(tl.load(temperatures + row), 1.1754943508222875e-38)
    top_k, top_p, log_min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(log_min_ps + row)
    limit = 0x7F800000  # infinity's bits
    if (top_k > 0) & (top_k < vocab):
        limit = _farthest(logits, vocab, largest, temperature, limit, top_k.to(tl.float64), False, LANES)
    if top_p < 1.0:
        masses = tl.zeros([LANES], tl.float32)
        for first in range(0, vocab, LANES):
            token = first + tl.arange(0, LANES)
            masses += _weights(logits, token, token < vocab, largest, temperature, limit, float("-inf"))
        mass = tl.maximum(top_p.to(tl.float64) * tl.sum(masses.to(tl.float64), 0), 1e-300)
        limit = tl.minimum(limit, _farthest(logits, vocab, largest, temperature, limit, mass, True, LANES))

    # As in draws.draw: first the strand, then the token in it.
    place = tl.arange(0, STRAND)
    sums = tl.zeros([STRANDS], tl.float64)
    for first in range(0, strands, STRANDS):
        strand = first + tl.arange(0, STRANDS)
        token = place[:, None] * strands + strand[None, :]
        within = (strand < strands)[None, :] & (token < vocab)
        weights = _weights(logits, token, within, largest, temperature, limit, log_min_p)
        sums += tl.sum(weights, 0).to(tl.float64)
    target = tl.load(uniforms + row) * tl.sum(sums, 0)
    before, passed, total = target * 0, 0, target * 0
    for first in range(0, strands, STRANDS):
        strand = first + tl.arange(0, STRANDS)
        token = place[:, None] * strands + strand[None, :]
        within = (strand < strands)[None, :] & (token < vocab)
        weights = _weights(logits, token, within, largest, temperature, limit, log_min_p)
        cumulative = total + tl.cumsum(tl.sum(weights, 0).to(tl.float64), 0)
        whole = (cumulative <= target) & (strand < strands)
        passed += tl.sum(whole.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(whole, cumulative, 0.0), 0))
        total = tl.max(cumulative, 0)
    chosen = tl.minimum(passed, strands - 1)  # beyond the end only if the row held NaN
    token = place * strands + chosen
    weights = _weights(logits, token, token < vocab, largest, temperature, limit, log_min_p)
    inside = tl.cumsum(weights.to(tl.float64), 0)
    number = tl.sum((inside <= target - before).to(tl.int32), 0)
    last = tl.max(tl.where(weights > 0, place, 0), 0)
    tl.store(drawn + row, tl.minimum(tl.minimum(number, last) * strands + chosen, vocab - 1))
