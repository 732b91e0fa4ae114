"""A linear layer of all experts in one launch, for float weights. The host does not wait for the device to learn which
experts the tokens chose.

A program computes a tile of pairs of one expert. The largest possible number of programs is launched; those without a
tile do nothing.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from loraplex_shard.ops.base import Routing

FEW, MANY = 16, 64  # pairs per program: FEW if an expert has no more than FEW on average, else MANY
ROWS = 64  # rows of a weight per program
COLUMNS = 64  # columns of a weight per iteration


class FloatExperts:
    """The matrices of all experts. They are not copied: a table has their addresses."""

    def __init__(self, matrices: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        self._held = matrices, biases  # the table has the addresses of these
        addresses = [
            (matrix.data_ptr(), 0 if bias is None else bias.data_ptr())
            for matrix, bias in zip(matrices, biases, strict=True)
        ]
        self.rows = matrices[0].shape[0]
        self.biased = biases[0] is not None
        self.table = torch.tensor(addresses, dtype=torch.int64, device=matrices[0].device)

    def linear(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Implements Operations.expert_linear."""
        (pairs, columns), experts = x.shape, len(self.table)
        at_once = FEW if pairs <= FEW * experts else MANY
        ends = ((routing.starts.diff() + (at_once - 1)) // at_once).cumsum(0)
        most = min(pairs, pairs // at_once + experts)
        out = x.new_empty((pairs, self.rows))
        _expert_linear[(triton.cdiv(self.rows, ROWS), most)](
            x,
            self.table,
            routing.starts,
            ends,
            out,
            self.rows,
            columns,
            experts,
            BIASED=self.biased,
            EXPERTS=triton.next_power_of_2(experts),
            PAIRS=at_once,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
        return out


@triton.jit
def _expert_linear(
    x,
    table,
    starts,
    ends,
    out,
    rows,
    columns,
    experts,
    BIASED: tl.constexpr,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype = x.dtype.element_ty
    tile = tl.program_id(1)
    every = tl.arange(0, EXPERTS)
    before = (every < experts) & (tl.load(ends + every, every < experts, 0) <= tile)
    expert = tl.sum(before.to(tl.int32), 0)
    if expert >= experts:
        return
    first = tl.max(tl.where(before, tl.load(ends + every, every < experts, 0), 0), 0)
    pair = tl.load(starts + expert) + (tile - first) * PAIRS + tl.arange(0, PAIRS)
    real = pair < tl.load(starts + expert + 1)
    weight = tl.multiple_of(tl.load(table + 2 * expert).to(tl.pointer_type(dtype)), 16)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = row < rows
    sums = tl.zeros([PAIRS, ROWS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        within = column < columns
        inputs = tl.load(x + pair[:, None] * columns + column[None, :], real[:, None] & within[None, :], 0.0)
        place = row.to(tl.int64)[None, :] * columns + column[:, None]
        weights = tl.load(weight + place, wanted[None, :] & within[:, None], 0.0)
        sums = tl.dot(inputs, weights, sums, input_precision="ieee")
    if BIASED:
        bias = tl.load(table + 2 * expert + 1).to(tl.pointer_type(dtype))
        sums += tl.load(bias + row, wanted, 0.0).to(tl.float32)[None, :]
    place = out + pair[:, None] * rows + row[None, :]
    tl.store(place, sums.to(dtype), real[:, None] & wanted[None, :])
