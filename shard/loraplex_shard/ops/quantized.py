"""Matrices of small integers with a scale per group of columns, and of float8 numbers with a scale per row. Every
quantized checkpoint is read into these forms."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

GROUPS = (32, 64)  # the group sizes that the operations support
FLOAT8 = torch.float8_e4m3fn
MOST_FLOAT8 = torch.finfo(FLOAT8).max
ALIGNED = 16  # torch multiplies float8 matrices whose rows and columns are multiples of this

Form = Literal["int8", "int4", "fp8"]


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """w = scale * value + offset, with a scale (and offset) per row and group of columns.

    8 bits: values int8 and no offsets. 4 bits: values uint8 in [0, 15], one to a byte, and offsets.
    The last group may be short.
    """

    bits: int
    group: int
    values: torch.Tensor  # [rows, columns]
    scales: torch.Tensor  # [rows, groups] float16
    offsets: torch.Tensor | None  # like scales

    def __post_init__(self) -> None:
        assert self.group in GROUPS and (self.bits == 4) == (self.offsets is not None)

    @property
    def form(self) -> Form:
        return "int8" if self.bits == 8 else "int4"

    def part(self, rows: slice, columns: slice) -> "QuantizedMatrix | None":
        """Returns a part of the matrix, or None if the part would cut a group."""
        begin, end, _ = columns.indices(self.values.shape[1])
        if begin % self.group or (end % self.group and end < self.values.shape[1]):
            return None
        groups = slice(begin // self.group, -(-end // self.group))
        offsets = None if self.offsets is None else self.offsets[rows, groups]
        return replace(self, values=self.values[rows, columns], scales=self.scales[rows, groups], offsets=offsets)

    def dequantized(self) -> torch.Tensor:
        """[rows, columns] float32."""
        columns = self.values.shape[1]
        scales, offsets = (
            None if each is None else each.float().repeat_interleave(self.group, 1)[:, :columns]
            for each in (self.scales, self.offsets)
        )
        assert scales is not None
        products = self.values.float() * scales
        return products if offsets is None else products + offsets


@dataclass(frozen=True, slots=True)
class Float8Matrix:
    """w = scale * value, with a scale per row."""

    values: torch.Tensor  # [rows, columns] FLOAT8
    scales: torch.Tensor  # [rows] float32

    @property
    def form(self) -> Form:
        return "fp8"

    def part(self, rows: slice, columns: slice) -> "Float8Matrix":
        return Float8Matrix(self.values[rows, columns], self.scales[rows])

    def dequantized(self) -> torch.Tensor:
        """[rows, columns] float32."""
        return self.values.float() * self.scales[:, None]


Quantized = QuantizedMatrix | Float8Matrix


def rounded(matrix: torch.Tensor, form: Form) -> Quantized:
    """Rounds a float matrix."""
    return to_float8(matrix) if form == "fp8" else quantize(matrix, 8 if form == "int8" else 4)


def to_float8(matrix: torch.Tensor) -> Float8Matrix:
    """Rounds a float matrix to the nearest float8 numbers. The largest one of each row becomes MOST_FLOAT8."""
    wide = matrix.float()
    peaks = wide.abs().amax(1)
    return Float8Matrix((wide * scaled_to(MOST_FLOAT8, peaks)[:, None]).to(FLOAT8), peaks / MOST_FLOAT8)


def fits_float8(shape: tuple[int, int]) -> bool:
    return shape[0] % ALIGNED == shape[1] % ALIGNED == 0


def quantize(matrix: torch.Tensor, bits: int) -> QuantizedMatrix:
    """Rounds a float matrix to the nearest integers: 8 bits symmetric in groups of 64, 4 bits asymmetric in groups of
    32.
    """
    group = 64 if bits == 8 else 32
    rows, columns = matrix.shape
    # Each row is padded with its last value, so that the range of its last group stays the same.
    last = matrix[:, -1:].expand(-1, -columns % group)
    padded = torch.cat((matrix, last), dim=1).float()
    groups = padded.view(rows, -1, group)
    if bits == 8:
        scales = _half(groups.abs().amax(-1) / 127)
        values = _divided(groups, scales).round_().clamp_(-127, 127).to(torch.int8)
        return QuantizedMatrix(8, group, values.view(rows, -1)[:, :columns], scales, None)
    low = groups.amin(-1)
    scales, offsets = _half((groups.amax(-1) - low) / 15), low.half()
    values = _divided(groups - offsets[:, :, None].float(), scales).round_().clamp_(0, 15).to(torch.uint8)
    return QuantizedMatrix(4, group, values.view(rows, -1)[:, :columns], scales, offsets)


def joined(parts: Sequence[Quantized]) -> Quantized | None:
    """Returns the rows of several matrices, one after the other; None if they do not have the same form."""
    floats = [part for part in parts if isinstance(part, Float8Matrix)]
    if len(floats) == len(parts):
        values, scales = zip(*((part.values, part.scales) for part in floats), strict=True)
        return Float8Matrix(torch.cat([each.view(torch.uint8) for each in values]).view(FLOAT8), torch.cat(scales))
    integers = [part for part in parts if isinstance(part, QuantizedMatrix)]
    if floats or len({(part.bits, part.group) for part in integers}) > 1:
        return None
    return _joined(integers)


def _joined(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    first = parts[0]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return QuantizedMatrix(
        first.bits,
        first.group,
        torch.cat([part.values for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(offsets) if offsets else None,
    )


def scaled_to(most: float, peaks: torch.Tensor) -> torch.Tensor:
    """Returns the factors by which values are multiplied so that their peak becomes `most`. They equal the kernels'
    factors to the last bit, so that no value rounds to the other side of a half."""
    return peaks.new_tensor(most) / peaks.where(peaks > 0, 1)  # torch computes most / peaks with the reciprocal


def rounded_to_int8(x: torch.Tensor, group: int) -> torch.Tensor:
    """Returns x [tokens, n] as the operations round it before a quantized product: to int8 in groups, each with its own
    scale."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group))
    groups = padded.view(len(x), -1, group)
    peaks = groups.abs().amax(-1, keepdim=True)
    rounded = (groups * scaled_to(127, peaks)).round_() * (peaks / 127)
    return rounded.view(padded.shape)[:, : x.shape[1]]


def rounded_to_float8(x: torch.Tensor) -> torch.Tensor:
    """Returns x [tokens, n] as the operations round it before a product in float8: each token with its own scale."""
    return to_float8(x).dequantized()


def _half(scales: torch.Tensor) -> torch.Tensor:
    return scales.clamp_(max=torch.finfo(torch.float16).max).half()


def _divided(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    divisors = scales.float()[:, :, None]
    return groups / divisors.where(divisors > 0, 1)
