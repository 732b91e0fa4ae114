"""A part of a matrix as GPTQ, AWQ and compressed-tensors store it, and what can be made of it."""

from dataclasses import dataclass

import torch

from loraplex_shard.ops.quantized import GROUPS, QuantizedMatrix

# Scales and offsets may be off by so much once they are float16, of which the spacing is 2 ** -10 of the value.
FLOAT16_ROUNDING = 2**-10


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """w = scale * (value - zero), with a scale and a zero for each row and `group` columns.

    `first` is the place of the first column in its group: a part of a matrix may begin within one.
    """

    bits: int
    group: int
    first: int
    values: torch.Tensor  # [rows, columns] uint8
    zeros: torch.Tensor  # [rows, groups] uint8
    scales: torch.Tensor  # [rows, groups] of any float dtype

    def dequantized(self) -> torch.Tensor:
        """[rows, columns] float32."""
        groups = (self.first + torch.arange(self.values.shape[1])) // self.group
        return (self.values.float() - self.zeros.float()[:, groups]) * self.scales.float()[:, groups]

    def quantized(self) -> QuantizedMatrix | None:
        """The same weights in the operations' form, but that scales and offsets are rounded to float16.

        None if they have no such form: where a group does not begin at a multiple of 32 columns, where 8 bits are not
        symmetric, and where a scale is beyond what float16 holds.
        """
        group = self._group_of_operations()
        if group is None or (self.bits == 8 and bool((self.zeros != 128).any())):
            return None
        # A group of theirs is several of ours with equal scales.
        groups = (self.first + torch.arange(0, self.values.shape[1], group)) // self.group
        scales = self.scales.float()[:, groups]
        offsets = -self.zeros.float()[:, groups] * scales
        if not (_fits(scales) and _fits(offsets)):
            return None
        if self.bits == 8:
            return QuantizedMatrix(8, group, (self.values ^ 128).view(torch.int8), scales.half(), None)
        return QuantizedMatrix(4, group, self.values, scales.half(), offsets.half())

    def _group_of_operations(self) -> int | None:
        fitting = [size for size in GROUPS if self.group % size == 0 and self.first % size == 0]
        one_scale = self.scales.shape[1] == 1  # then any size does
        return max(fitting or GROUPS) if fitting or one_scale else None


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, words] int32 -> [n, words * 32 / bits] uint8, the lowest bits of a word first."""
    data = words.contiguous().view(torch.uint8)
    return data if bits == 8 else torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


def _fits(values: torch.Tensor) -> bool:
    return bool(((values.half().float() - values).abs() <= values.abs() * FLOAT16_ROUNDING).all())
