"""LoRA deltas of many adapters at once. Each adapter is read once, without being copied, at its own lora_rank.

This follows Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285): the tokens come sorted by adapter, and a program
computes a tile of tokens that share an adapter. It finds the adapter's matrices through the adapter's table (see
kernels/csrc/tables.h). One kernel computes A x for all projections that share x; a second one adds B (A x).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from loraplex_shard.kernels.tables import places, width
from loraplex_shard.shapes.batch import Segment
from loraplex_shard.shapes.layout import LinearLayout

SHORT, LONG = 16, 64  # tokens per tile: SHORT if no segment is longer than SHORT, else LONG
RANKS = 16  # ranks of an adapter per program or iteration
COLUMNS = 128  # columns of A per iteration, or columns of B per program
ALIGNMENT = 16  # outputs: if the projections of a layer begin at multiples of it, several values are loaded at once
SLICE, SLICES = 512, 8  # with short tiles: columns of A per program, and the largest number of programs for A

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

    tiles: torch.Tensor  # [tiles, 3] int64: first token, tokens, address of the adapter's table
    length: int  # the largest number of tokens in a tile
    widest: int  # the largest lora_rank of an adapter in one layer, summed over the layer's projections
    int8: bool

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "LoraTiles":
        longest = max((segment.stop - segment.start for segment in segments), default=0)
        length = SHORT if longest <= SHORT else LONG
        tiles = [
            (first, min(length, segment.stop - first), segment.adapter.table.data_ptr())
            for segment in segments
            for first in range(segment.start, segment.stop, length)
        ]
        return cls(
            torch.tensor(tiles, dtype=torch.int64, device=device),
            length,
            max((segment.adapter.widest for segment in segments), default=0),
            any(segment.adapter.int8 for segment in segments),
        )


def add_lora_delta(out: torch.Tensor, x: torch.Tensor, runs: LoraTiles, layout: LinearLayout) -> None:
    """Implements Operations.add_lora_delta."""
    tokens, columns = x.shape
    layer, aligned = layout.index, layout.unit % ALIGNMENT == 0
    slices = min(SLICES, triton.cdiv(columns, SLICE)) if runs.length == SHORT else 1
    shrunk = x.new_empty((slices, tokens, runs.widest), dtype=torch.float32)
    count = len(runs.tiles)
    _shrink[(count, max(1, triton.cdiv(runs.widest, RANKS)), slices)](
        x,
        shrunk,
        runs.tiles,
        layer,
        tokens,
        runs.widest,
        columns,
        triton.cdiv(columns, slices * COLUMNS) * COLUMNS,
        INT8=runs.int8,
        TOKENS=runs.length,
        RANKS=RANKS,
        COLUMNS=COLUMNS,
    )
    _expand[(count, triton.cdiv(out.shape[1], COLUMNS))](
        shrunk,
        out,
        runs.tiles,
        layer,
        tokens,
        runs.widest,
        out.shape[1],
        INT8=runs.int8,
        ALIGNED=aligned,
        SLICES=slices,
        TOKENS=runs.length,
        RANKS=RANKS,
        COLUMNS=COLUMNS,
        num_warps=4 if runs.length == SHORT else 8,
    )


@triton.jit(do_not_specialize=["layer", "tokens", "widest"])
def _shrink(
    x,
    shrunk,
    tiles,
    layer,
    tokens,
    widest,
    columns,
    slice_length,
    INT8: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes shrunk[slice, token, rank] in float32: the part of A x that comes from one slice of A's columns."""
    dtype = x.dtype.element_ty
    tile = tiles + tl.program_id(0) * 3
    entry = tl.load(tile + 2).to(tl.pointer_type(tl.int64)) + layer * LAYER_WIDTH
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    lora_rank = tl.load(entry + LORA_RANK)
    if tl.program_id(1) * RANKS >= lora_rank:
        return
    a = tl.multiple_of(tl.load(entry + SHRINK).to(tl.pointer_type(tl.int8 if INT8 else dtype)), 16)
    row = tl.arange(0, TOKENS)
    token, real = tl.load(tile) + row, row < tl.load(tile + 1)
    sums = tl.zeros([TOKENS, RANKS], tl.float32)
    start = tl.program_id(2) * slice_length
    for first in range(start, tl.minimum(start + slice_length, columns), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        within = column < columns
        inputs = tl.load(x + token[:, None] * columns + column[None, :], real[:, None] & within[None, :], 0.0)
        wanted = within[:, None] & (rank < lora_rank)[None, :]
        weights = tl.load(a + rank[None, :] * columns + column[:, None], wanted, 0)
        sums = tl.dot(inputs, weights.to(dtype), sums, input_precision="ieee")
    if INT8:
        scales = tl.load(entry + SCALES).to(tl.pointer_type(tl.float32))
        sums *= tl.load(scales + rank, rank < lora_rank, 0.0)[None, :]
    place = (tl.program_id(2).to(tl.int64) * tokens + token)[:, None] * widest + rank[None, :]
    tl.store(shrunk + place, sums, real[:, None] & (rank < lora_rank)[None, :])


@triton.jit(do_not_specialize=["layer", "tokens", "widest"])
def _expand(
    shrunk,
    out,
    tiles,
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
    """Adds B's product with the sum of the slices to some columns of out, one projection after the other. If the
    adapter has factors and shifts for a projection's outputs, they are applied to out first."""
    dtype = out.dtype.element_ty
    tile = tiles + tl.program_id(0) * 3
    entry = tl.load(tile + 2).to(tl.pointer_type(tl.int64)) + layer * LAYER_WIDTH
    begin = tl.program_id(1) * COLUMNS
    column = begin + tl.arange(0, COLUMNS)
    row = tl.arange(0, TOKENS)
    token, real = tl.load(tile) + row, row < tl.load(tile + 1)
    for number in range(0, tl.load(entry + PARTS)):
        part = entry + FIRST_PART + PART_WIDTH * number
        rank_start, rank_stop = tl.load(part + RANK_START), tl.load(part + RANK_STOP)
        start, stop = tl.load(part + START), tl.load(part + STOP)
        if ALIGNED:  # otherwise several values may not be loaded at once
            start, stop = tl.multiple_of(start, 16), tl.multiple_of(stop, 16)
        if (start < begin + COLUMNS) & (begin < stop):
            b = tl.multiple_of(tl.load(part + EXPAND).to(tl.pointer_type(tl.int8 if INT8 else dtype)), 16)
            own = (column >= start) & (column < stop)
            sums = tl.zeros([TOKENS, COLUMNS], tl.float32)
            for first in range(rank_start, rank_stop, RANKS):
                rank = first + tl.arange(0, RANKS)
                within = rank < rank_stop
                inputs = tl.zeros([TOKENS, RANKS], tl.float32)
                for piece in tl.static_range(SLICES):
                    place = (piece * tokens + token)[:, None] * widest + rank[None, :]
                    inputs += tl.load(shrunk + place, real[:, None] & within[None, :], 0.0)
                place = (rank - rank_start)[:, None] * (stop - start) + (column - start)[None, :]
                weights = tl.load(b + place, within[:, None] & own[None, :], 0)
                sums = tl.dot(inputs.to(dtype), weights.to(dtype), sums, input_precision="ieee")
            place = out + token[:, None] * out_features + column[None, :]
            ours = real[:, None] & own[None, :]
            base = tl.load(place, ours, 0.0).to(tl.float32)
            affine = tl.load(part + AFFINE)
            if affine != 0:
                factors = affine.to(tl.pointer_type(tl.float32)) + (column - start)
                base = base * tl.load(factors, own, 1.0)[None, :] + tl.load(factors + (stop - start), own, 0.0)[None, :]
            tl.store(place, (base + sums).to(dtype), ours)
