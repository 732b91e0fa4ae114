"""Linear layers in float8, on GPUs whose tensor cores multiply it: torch's product of rounded inputs and weights."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from loraplex_shard.ops.quantized import FLOAT8, MOST_FLOAT8

COLUMNS = 4096  # columns that a program rounds at once


@dataclass(frozen=True, slots=True)
class Float8Weight:
    values: torch.Tensor  # [rows, columns] FLOAT8
    scales: torch.Tensor  # [rows] float32

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def part(self, rows: slice) -> "Float8Weight":
        return Float8Weight(self.values[rows], self.scales[rows])


def linear_float8(x: torch.Tensor, weight: Float8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Implements Operations.linear. torch adds to the sums in less than float32 now and then, as other servers do, and
    returns bfloat16 whatever the dtype is."""
    values, scales = torch.empty_like(x, dtype=FLOAT8), x.new_empty((len(x), 1), dtype=torch.float32)
    columns = x.shape[1]
    _round_to_float8[(len(x),)](
        x,
        values,
        scales,
        MOST=MOST_FLOAT8,
        N=columns,
        COLUMNS=min(COLUMNS, triton.next_power_of_2(columns)),
        num_warps=8,
    )
    out = torch._scaled_mm(
        values,
        weight.values.T,
        scales,
        weight.scales[None],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.to(x.dtype)


@triton.jit
def _round_to_float8(x, values, scales, MOST: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Rounds one token. Its largest number becomes MOST."""
    place = tl.program_id(0).to(tl.int64) * N
    lane = tl.arange(0, COLUMNS)
    peaks = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, N, COLUMNS):
        inputs = tl.load(x + place + first + lane, first + lane < N, 0.0).to(tl.float32)
        peaks = tl.maximum(peaks, tl.abs(inputs))
    peak = tl.max(peaks, 0)
    factor = MOST / tl.where(peak > 0, peak, 1.0)
    for first in range(0, N, COLUMNS):
        inputs = tl.load(x + place + first + lane, first + lane < N, 0.0).to(tl.float32)
        tl.store(values + place + first + lane, (inputs * factor).to(values.dtype.element_ty), first + lane < N)
    tl.store(scales + tl.program_id(0), peak / MOST)
