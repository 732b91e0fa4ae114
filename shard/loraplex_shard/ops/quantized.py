"""Matrices of small integers with a scale per group of columns. Every quantized checkpoint is read into this form."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

GROUPS = (32, 64)  # the group sizes that the operations support


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


def joined(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Returns the rows of several matrices of the same kind, one after the other."""
    first = parts[0]
    assert all((part.bits, part.group) == (first.bits, first.group) for part in parts)
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return QuantizedMatrix(
        first.bits,
        first.group,
        torch.cat([part.values for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(offsets) if offsets else None,
    )


def to_integers(peaks: torch.Tensor) -> torch.Tensor:
    """Returns the factors by which values are multiplied so that their peak becomes 127. They equal the kernels'
    factors to the last bit, so that no value rounds to the other side of a half."""
    return peaks.new_tensor(127) / peaks.where(peaks > 0, 1)  # torch computes 127 / peaks with the reciprocal


def rounded_to_int8(x: torch.Tensor, group: int) -> torch.Tensor:
    """Returns x [tokens, n] as the operations round it before a quantized product: to int8 in groups, each with its own
    scale."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group))
    groups = padded.view(len(x), -1, group)
    peaks = groups.abs().amax(-1, keepdim=True)
    rounded = (groups * to_integers(peaks)).round_() * (peaks / 127)
    return rounded.view(padded.shape)[:, : x.shape[1]]


def _half(scales: torch.Tensor) -> torch.Tensor:
    return scales.clamp_(max=torch.finfo(torch.float16).max).half()


def _divided(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    divisors = scales.float()[:, :, None]
    return groups / divisors.where(divisors > 0, 1)
