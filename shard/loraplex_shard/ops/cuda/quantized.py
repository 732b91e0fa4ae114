"""Linear layers in integers: weights of 8 or 4 bits, and inputs rounded to 8 bits, in groups that share a scale.

The products of a group are summed in integers on tensor cores, then scaled and added to a sum in float32. torch's own
integer products support one scale per row, not one per group. For many tokens, scaling so many sums would take longer
than the products: the rounded inputs and the weights become floats again, and cuBLAS multiplies them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from loraplex_shard.ops.quantized import QuantizedMatrix

ROWS = 32  # rows of the weight per program
FEW, MANY = 16, 64  # tokens per program: FEW if there are no more than FEW, else MANY; for more, cuBLAS multiplies
AT_ONCE = 1 << 27  # weights that are floats at the same time
GROUPS = 8  # groups that one program rounds


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """With 4 bits, two groups share their bytes: the first group's values are in the low halves, the second's in the
    high halves."""

    values: torch.Tensor  # [rows, bytes]: int8 for 8 bits, uint8 for 4 bits
    scales: torch.Tensor  # [groups, rows] float16
    offsets: torch.Tensor | None  # like scales, for 4 bits only
    columns: int
    group: int

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + (0 if self.offsets is None else self.offsets.nbytes)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.values)

    def part(self, rows: slice) -> "IntegerWeight":
        offsets = None if self.offsets is None else self.offsets[:, rows]
        return IntegerWeight(self.values[rows], self.scales[:, rows], offsets, self.columns, self.group)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns the matrix's rows as float32: [indices, columns]."""
        values = self.values[indices]
        if self.offsets is not None:
            pairs = values.view(len(values), -1, 1, self.group)
            values = torch.cat((pairs & 15, pairs >> 4), dim=2).flatten(1)
        groups = values.view(len(values), -1, self.group) * self.scales.T[indices].float()[:, :, None]
        if self.offsets is not None:
            groups += self.offsets.T[indices].float()[:, :, None]
        return groups.flatten(1)[:, : self.columns].contiguous()


def pack(matrix: QuantizedMatrix, device: torch.device) -> IntegerWeight:
    """Returns the matrix on the device, in the form that the kernels read."""
    rows, columns = matrix.values.shape
    at_once = matrix.group * (8 // matrix.bits)
    groups = -(-columns // at_once) * at_once // matrix.group
    values = F.pad(matrix.values.to(device), (0, groups * matrix.group - columns))
    if matrix.bits == 4:
        pairs = values.view(rows, -1, 2, matrix.group)
        values = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)
    scales, offsets = (
        None if each is None else F.pad(each.to(device), (0, groups - each.shape[1])).T.contiguous()
        for each in (matrix.scales, matrix.offsets)
    )
    assert scales is not None
    return IntegerWeight(values, scales, offsets, columns, matrix.group)


def linear(x: torch.Tensor, weight: IntegerWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Implements Operations.linear."""
    tokens, (groups, rows) = len(x), weight.scales.shape
    if tokens > MANY:
        return _linear_of_floats(x, weight, bias)
    values = x.new_empty((tokens, groups * weight.group), dtype=torch.int8)
    scales, sums = (x.new_empty((tokens, groups), dtype=torch.float32) for _ in range(2))
    _round[(tokens, triton.cdiv(groups, GROUPS))](
        x, values, scales, sums, groups, N=weight.columns, GROUP=weight.group, GROUPS=GROUPS
    )
    out = x.new_empty((tokens, rows))
    at_once = FEW if tokens <= FEW else MANY
    _linear[(triton.cdiv(rows, ROWS), triton.cdiv(tokens, at_once))](
        values,
        scales,
        sums,
        weight.values,
        weight.scales,
        weight.offsets,
        bias,
        out,
        tokens,
        rows,
        groups,
        weight.values.stride(0),
        weight.scales.stride(0),
        GROUP=weight.group,
        TOKENS=at_once,
        ROWS=ROWS,
    )
    return out


def _linear_of_floats(x: torch.Tensor, weight: IntegerWeight, bias: torch.Tensor | None) -> torch.Tensor:
    groups, rows = weight.scales.shape
    rounded = torch.empty_like(x)
    _round[(len(x), triton.cdiv(groups, GROUPS))](
        x, rounded, None, None, groups, N=weight.columns, GROUP=weight.group, GROUPS=GROUPS
    )
    step = max(ROWS, AT_ONCE // weight.columns // ROWS * ROWS)
    parts = [
        F.linear(rounded, _floats(weight.part(slice(first, first + step)), x.dtype)) for first in range(0, rows, step)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out if bias is None else out.add_(bias)


def _floats(weight: IntegerWeight, dtype: torch.dtype) -> torch.Tensor:
    groups, rows = weight.scales.shape
    out = torch.empty((rows, weight.columns), dtype=dtype, device=weight.values.device)
    packed = 1 if weight.offsets is None else 2
    _dequantize[(triton.cdiv(rows, ROWS), groups // packed)](
        weight.values,
        weight.scales,
        weight.offsets,
        out,
        rows,
        weight.values.stride(0),
        weight.scales.stride(0),
        N=weight.columns,
        GROUP=weight.group,
        ROWS=ROWS,
    )
    return out


@triton.jit
def nearest(x):
    """Rounds floats below 2^22 to the nearest integers, halves to even: from 2^23 on, every float is an integer."""
    return x + 12582912.0 - 12582912.0  # 1.5 * 2^23


@triton.jit
def _round(x, values, scales, sums, groups, N: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Stores each group's integers, their scale, and their sum times the scale; or, without scales, their numbers."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inputs = tl.load(x + token * N + column, column < N, 0.0).to(tl.float32)
    peak = tl.max(tl.abs(inputs), 1)
    scale = peak / 127
    rounded = nearest(inputs * (127 / tl.where(peak > 0, peak, 1.0))[:, None])
    real = group < groups
    if scales is None:
        numbers = (rounded * scale[:, None]).to(x.dtype.element_ty)
        tl.store(values + token * N + column, numbers, real[:, None] & (column < N))
    else:
        tl.store(values + token * groups * GROUP + column, rounded.to(tl.int8), real[:, None])
        tl.store(scales + token * groups + group, scale, real)
        tl.store(sums + token * groups + group, scale * tl.sum(rounded, 1), real)


@triton.jit
def _dequantize(
    values,
    scales,
    offsets,
    out,
    rows,
    row_bytes,
    scale_stride,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    PACKED: tl.constexpr = 1 if offsets is None else 2  # groups that share their bytes
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, GROUP)
    wanted = row < rows
    place = row.to(tl.int64)[:, None] * row_bytes + tl.program_id(1) * GROUP + column[None, :]
    packed = tl.load(values + place, wanted[:, None], 0)
    for half in tl.static_range(PACKED):
        group = tl.program_id(1) * PACKED + half
        weights = packed if PACKED == 1 else packed >> 4 * half & 15
        scale = tl.load(scales + group * scale_stride + row, wanted, 0.0).to(tl.float32)
        numbers = weights.to(tl.float32) * scale[:, None]
        if offsets is not None:
            numbers += tl.load(offsets + group * scale_stride + row, wanted, 0.0).to(tl.float32)[:, None]
        to = group * GROUP + column[None, :]
        within = wanted[:, None] & (to < N)
        tl.store(out + row.to(tl.int64)[:, None] * N + to, numbers.to(out.dtype.element_ty), within)


@triton.jit(do_not_specialize=["tokens"])
def _linear(
    x,
    x_scales,
    x_sums,
    values,
    scales,
    offsets,
    bias,
    out,
    tokens,
    rows,
    groups,
    row_bytes,
    scale_stride,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    PACKED: tl.constexpr = 1 if offsets is None else 2  # groups that share their bytes
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    column = tl.arange(0, GROUP)
    wanted, real = row < rows, token < tokens
    sums = tl.zeros([TOKENS, ROWS], tl.float32)
    for first in range(0, groups, PACKED):
        place = row.to(tl.int64)[None, :] * row_bytes + first // PACKED * GROUP + column[:, None]
        packed = tl.load(values + place, wanted[None, :], 0)
        for half in tl.static_range(PACKED):
            group = first + half
            weights = packed if PACKED == 1 else (packed >> 4 * half & 15).to(tl.int8)
            place = token * groups + group
            inputs = tl.load(x + place[:, None] * GROUP + column[None, :], real[:, None], 0)
            scale = tl.load(scales + group * scale_stride + row, wanted, 0.0).to(tl.float32)
            products = tl.dot(inputs, weights, out_dtype=tl.int32).to(tl.float32)
            sums += products * tl.load(x_scales + place, real, 0.0)[:, None] * scale[None, :]
            if offsets is not None:
                offset = tl.load(offsets + group * scale_stride + row, wanted, 0.0).to(tl.float32)
                sums += tl.load(x_sums + place, real, 0.0)[:, None] * offset[None, :]
    if bias is not None:
        sums += tl.load(bias + row, wanted, 0.0).to(tl.float32)[None, :]
    to = out + token[:, None] * rows + row[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), real[:, None] & wanted[None, :])
