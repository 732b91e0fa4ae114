"""LoRA deltas of many adapters at once. Each adapter is read once, without being copied, at its own lora_rank.

This follows Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285): the tokens come sorted by adapter, and a program
computes a tile of tokens that share an adapter. It finds the adapter's matrices through the adapter's table (see
kernels/csrc/tables.h). One kernel computes A x for all projections that share x; a second one adds B (A x).

A token's result does not depend on its neighbours: A's columns are always cut in the same slices, and the slices' sums
added in their order, however many programs share them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from loraplex_shard.kernels.tables import places, width
from loraplex_shard.ops.cuda.worklists import Worklist, multiprocessors, numbered
from loraplex_shard.shapes.batch import Segment
from loraplex_shard.shapes.layout import LinearLayout

TOKENS = 32  # tokens per tile
RANKS = 16  # ranks of an adapter per iteration
RANK_PROGRAMS = 3  # programs that share a tile's ranks: one for each of three projections with few ranks
SLICE, SLICES = 512, 8  # the least columns of A in a slice, and the largest number of slices
SHRINK_COLUMNS, EXPAND_COLUMNS = 128, 256  # columns of A per iteration, and columns of B per program
ALIGNMENT = 16  # outputs: if the projections of a layer begin at multiples of it, several values are loaded at once

# The places of fields in an adapter's table.
LAYER_WIDTH, PART_WIDTH = tl.constexpr(width("LoraLayer")), tl.constexpr(width("LoraPart"))
LORA_RANK, PARTS, SHRINK, SCALES, FIRST_PART = (
    tl.constexpr(places("LoraLayer")[field]) for field in ("lora_rank", "parts", "shrink", "scales", "part")
)
RANK_START, RANK_STOP, START, STOP, EXPAND, AFFINE = (
    tl.constexpr(places("LoraPart")[field])
    for field in ("rank_start", "rank_stop", "start", "stop", "expand", "affine")
)


@dataclass(frozen=True, slots=True)
class LoraTiles:
    """The tokens of a batch in tiles that share an adapter."""

    tiles: Worklist  # (first token, tokens, address of the adapter's table), int64
    widest: int  # at least the lora_rank of an adapter in one layer, summed over the layer's projections
    int8: bool

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "LoraTiles":
        return cls(Worklist.of(tile(segments), device), widest(segments), any(run.adapter.int8 for run in segments))


def tile(segments: Sequence[Segment]) -> NDArray[np.int64]:
    """The entries of the tiles, [n, 3]."""
    rows = [(segment.start, segment.stop, segment.adapter.table.data_ptr()) for segment in segments]
    starts, stops, tables = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    counts = -(-(stops - starts) // TOKENS)
    firsts = np.repeat(starts, counts) + numbered(counts) * TOKENS
    lengths = np.minimum(np.repeat(stops, counts) - firsts, TOKENS)
    return np.stack((firsts, lengths, np.repeat(tables, counts)), axis=1)


def widest(segments: Sequence[Segment]) -> int:
    return max((segment.adapter.widest for segment in segments), default=0)


def add_lora_delta(out: torch.Tensor, x: torch.Tensor, runs: LoraTiles, layout: LinearLayout) -> None:
    """Implements Operations.add_lora_delta."""
    tokens, columns = x.shape
    widest = triton.cdiv(max(1, runs.widest), RANKS) * RANKS
    slices = min(SLICES, triton.cdiv(columns, SLICE))
    # The slices of a tile have a program each, unless the tiles alone keep the device busy.
    split = slices if runs.tiles.room < 2 * multiprocessors(x.device) else 1
    shrunk = x.new_empty((split, tokens, widest), dtype=torch.float32)
    _shrink[(runs.tiles.room, RANK_PROGRAMS, split)](
        x,
        shrunk,
        runs.tiles.entries,
        runs.tiles.count,
        layout.index,
        tokens,
        widest,
        columns,
        triton.cdiv(columns, slices * SHRINK_COLUMNS) * SHRINK_COLUMNS,
        INT8=runs.int8,
        SLICES=slices // split,
        TOKENS=TOKENS,
        RANKS=RANKS,
        COLUMNS=SHRINK_COLUMNS,
    )
    _expand[(runs.tiles.room, triton.cdiv(out.shape[1], EXPAND_COLUMNS))](
        shrunk,
        out,
        runs.tiles.entries,
        runs.tiles.count,
        layout.index,
        tokens,
        widest,
        out.shape[1],
        INT8=runs.int8,
        ALIGNED=layout.unit % ALIGNMENT == 0,
        SLICES=split,
        TOKENS=TOKENS,
        RANKS=RANKS,
        COLUMNS=EXPAND_COLUMNS,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["layer", "tokens"])
def _shrink(
    x,
    shrunk,
    tiles,
    count,
    layer,
    tokens,
    widest,
    columns,
    slice_length,
    INT8: tl.constexpr,
    SLICES: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes shrunk[program, token, rank] in float32: A x as far as it comes from SLICES slices of A's columns."""
    if tl.program_id(0) >= tl.load(count):
        return
    dtype = x.dtype.element_ty
    tile = tiles + tl.program_id(0) * 3
    entry = tl.load(tile + 2).to(tl.pointer_type(tl.int64)) + layer * LAYER_WIDTH
    lora_rank = tl.load(entry + LORA_RANK).to(tl.int32)
    a = tl.multiple_of(tl.load(entry + SHRINK).to(tl.pointer_type(tl.int8 if INT8 else dtype)), 16)
    row = tl.arange(0, TOKENS)
    token, real = tl.load(tile), row < tl.load(tile + 1)
    # Places within a tile have 32 bits: registers are few.
    x += token * columns
    to = shrunk + (tl.program_id(2).to(tl.int64) * tokens + token) * widest + (row * widest)[:, None]
    for first_rank in range(tl.program_id(1) * RANKS, lora_rank, tl.num_programs(1) * RANKS):
        rank = first_rank + tl.arange(0, RANKS)
        wanted = rank < lora_rank
        total = tl.zeros([TOKENS, RANKS], tl.float32)
        for number in range(SLICES):
            start = (tl.program_id(2) * SLICES + number) * slice_length
            sums = tl.zeros([TOKENS, RANKS], tl.float32)
            for first in range(start, tl.minimum(start + slice_length, columns), COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                within = column < columns
                inputs = tl.load(x + (row[:, None] * columns + column[None, :]), real[:, None] & within[None, :], 0.0)
                weights = tl.load(a + (rank[None, :] * columns + column[:, None]), within[:, None] & wanted[None, :], 0)
                sums = tl.dot(inputs, weights.to(dtype), sums, input_precision="ieee")
            total += sums
        tl.store(to + rank[None, :], total, real[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["layer", "tokens"])
def _expand(
    shrunk,
    out,
    tiles,
    count,
    layer,
    tokens,
    widest,
    out_features,
    INT8: tl.constexpr,
    ALIGNED: tl.constexpr,
    SLICES: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds B's product with the sum of _shrink's SLICES parts to some columns of out, one projection after the other.
    If the adapter has factors and shifts for a projection's outputs, they are applied to out first."""
    if tl.program_id(0) >= tl.load(count):
        return
    dtype = out.dtype.element_ty
    tile = tiles + tl.program_id(0) * 3
    entry = tl.load(tile + 2).to(tl.pointer_type(tl.int64)) + layer * LAYER_WIDTH
    scales = tl.load(entry + SCALES).to(tl.pointer_type(tl.float32))
    begin = tl.program_id(1) * COLUMNS
    column = begin + tl.arange(0, COLUMNS)
    row = tl.arange(0, TOKENS)
    token, real = tl.load(tile), row < tl.load(tile + 1)
    shrunk += token * widest
    out += token * out_features
    for number in range(0, tl.load(entry + PARTS)):
        part = entry + FIRST_PART + PART_WIDTH * number
        rank_start, rank_stop = tl.load(part + RANK_START).to(tl.int32), tl.load(part + RANK_STOP).to(tl.int32)
        start, stop = tl.load(part + START).to(tl.int32), tl.load(part + STOP).to(tl.int32)
        if ALIGNED:  # otherwise several values may not be loaded at once
            start, stop = tl.multiple_of(start, 16), tl.multiple_of(stop, 16)
        if (start < begin + COLUMNS) & (begin < stop):
            b = tl.multiple_of(tl.load(part + EXPAND).to(tl.pointer_type(tl.int8 if INT8 else dtype)), 16)
            own = (column >= start) & (column < stop)
            place = out + (row[:, None] * out_features + column[None, :])
            ours = real[:, None] & own[None, :]
            base = tl.load(place, ours, 0.0)  # it arrives during the products
            affine = tl.load(part + AFFINE)
            sums = tl.zeros([TOKENS, COLUMNS], tl.float32)
            for first in range(rank_start, rank_stop, RANKS):
                rank = first + tl.arange(0, RANKS)
                within = rank < rank_stop
                inputs = tl.zeros([TOKENS, RANKS], tl.float32)
                for piece in tl.static_range(SLICES):
                    shrunk_place = row[:, None] * widest + rank[None, :]
                    inputs += tl.load(
                        shrunk + piece * tokens * widest + shrunk_place, real[:, None] & within[None, :], 0.0
                    )
                if INT8:
                    inputs *= tl.load(scales + rank, within, 0.0)[None, :]
                weight_place = (rank - rank_start)[:, None] * (stop - start) + (column - start)[None, :]
                weights = tl.load(b + weight_place, within[:, None] & own[None, :], 0)
                sums = tl.dot(inputs.to(dtype), weights.to(dtype), sums, input_precision="ieee")
            summand = base.to(tl.float32)
            if affine != 0:
                factors = affine.to(tl.pointer_type(tl.float32)) + (column - start)
                summand = summand * tl.load(factors, own, 1.0)[None, :]
                summand += tl.load(factors + (stop - start), own, 0.0)[None, :]
            tl.store(place, (summand + sums).to(dtype), ours)
