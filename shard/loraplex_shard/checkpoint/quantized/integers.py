"""A part of a matrix as GPTQ, AWQ, compressed-tensors and bitsandbytes store integers, and what can be made of it."""

from dataclasses import dataclass

import numpy as np
import torch

from loraplex_shard.ops.quantized import GROUPS, QuantizedMatrix

# Scales and offsets may be off by so much once they are float16, of which the spacing is 2 ** -10 of the value.
FLOAT16_ROUNDING = 2**-10
WORD = 32


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """w = scale * (value - zero), with a scale and a zero for each row and `group` columns.

    `first` is the place of the first column in its group: a part of a matrix may begin within one. Where groups are not
    columns side by side, `order` says which group each column is of, and scales and zeros are those of all groups.
    """

    bits: int
    group: int
    first: int
    values: torch.Tensor  # [rows, columns] uint8
    zeros: torch.Tensor  # [rows, groups] uint8, or of any float dtype
    scales: torch.Tensor  # [rows, groups] of any float dtype
    order: torch.Tensor | None = None  # [columns]

    def dequantized(self) -> torch.Tensor:
        """[rows, columns] float32."""
        groups = self._groups(step=1) if self.order is None else self.order
        return (self.values.float() - self.zeros.float()[:, groups]) * self.scales.float()[:, groups]

    def quantized(self) -> QuantizedMatrix | None:
        """The same weights in the operations' form, but that scales and offsets are rounded to float16.

        None if they have no such form: where a group does not begin at a multiple of 32 columns, where more than
        4 bits are not symmetric, and where a scale is beyond what float16 holds.
        """
        group = self._group_of_operations()
        middle = 1 << (self.bits - 1)
        if group is None or (self.bits > 4 and bool((self.zeros != middle).any())):
            return None
        # A group of theirs is several of ours with equal scales.
        groups = self._groups(step=group)
        scales = self.scales.float()[:, groups]
        offsets = -self.zeros.float()[:, groups] * scales
        if not (_fits(scales) and _fits(offsets)):
            return None
        if self.bits > 4:
            return QuantizedMatrix(8, group, (self.values - middle).view(torch.int8), scales.half(), None)
        return QuantizedMatrix(4, group, self.values, scales.half(), offsets.half())

    def _groups(self, step: int) -> torch.Tensor:
        """Of each column, or of each first one of `step`."""
        return (self.first + torch.arange(0, self.values.shape[1], step)) // self.group

    def _group_of_operations(self) -> int | None:
        side_by_side = self.group if self.order is None else 1
        fitting = [size for size in GROUPS if side_by_side % size == 0 and self.first % size == 0]
        one_scale = self.scales.shape[1] == 1  # then any size does
        return max(fitting or GROUPS) if fitting or one_scale else None


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, words] int32 -> [n, words * 32 / bits] uint8, the lowest bits of a word first."""
    data = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        most = (1 << bits) - 1
        return torch.stack([data >> shift & most for shift in range(0, 8, bits)], dim=-1).flatten(1)
    stream = np.unpackbits(data.numpy(), axis=1, bitorder="little")
    integers = stream[:, : stream.shape[1] // bits * bits].reshape(len(data), -1, bits)
    return torch.from_numpy(np.packbits(integers, axis=2, bitorder="little")[:, :, 0])


def word_count(integers: int, bits: int) -> int:
    """How many int32 words they take."""
    return -(-integers * bits // WORD)


def words(part: range, bits: int) -> slice:
    """The int32 words that hold these integers, and some more: every 32 integers begin a word."""
    return slice(part.start // WORD * bits, -(-part.stop // WORD) * bits)


def within_words(part: range) -> slice:
    """Where these integers are in what words(part, bits) holds."""
    first = part.start % WORD
    return slice(first, first + len(part))


def groups(columns: range, group: int) -> slice:
    """The groups that these columns are in."""
    return slice(columns.start // group, -(-columns.stop // group))


def _fits(values: torch.Tensor) -> bool:
    return bool(((values.half().float() - values).abs() <= values.abs() * FLOAT16_ROUNDING).all())
