"""A part of a matrix in integers, as GPTQ, AWQ, compressed-tensors, bitsandbytes and HQQ store it, and its
conversion."""

from dataclasses import dataclass

import numpy as np
import torch

from loraplex_shard.ops.quantized import GROUPS, QuantizedMatrix

# The relative error that scales and offsets may get by rounding to float16, whose spacing is 2 ** -10 of the value.
FLOAT16_ROUNDING = 2**-10
WORD = 32


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """w = scale * (value - zero), with a scale and a zero for each row and `group` columns.

    `first` is the index of the first column within its group, since a part of a matrix may begin inside a group. If the
    columns of a group are not neighbours, `order` has the group of each column, and scales and zeros are those of all
    groups.
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
        """Returns the weights in the operations' form. Only scales and offsets change: they are rounded to float16.

        Returns None if there is no such form: if a group does not begin at a multiple of 32 columns, if there are more
        than 4 bits and a zero is not in the middle, or if a scale does not fit into float16.
        """
        group = self._group_of_operations()
        middle = 1 << (self.bits - 1)
        if group is None or (self.bits > 4 and bool((self.zeros != middle).any())):
            return None
        # A group of the checkpoint is one or more groups of the operations with equal scales.
        groups = self._groups(step=group)
        scales = self.scales.float()[:, groups]
        offsets = -self.zeros.float()[:, groups] * scales
        if not (_fits(scales) and _fits(offsets)):
            return None
        if self.bits > 4:
            return QuantizedMatrix(8, group, (self.values - middle).view(torch.int8), scales.half(), None)
        return QuantizedMatrix(4, group, self.values, scales.half(), offsets.half())

    def _groups(self, step: int) -> torch.Tensor:
        """The group of every `step`-th column."""
        return (self.first + torch.arange(0, self.values.shape[1], step)) // self.group

    def _group_of_operations(self) -> int | None:
        side_by_side = self.group if self.order is None else 1
        fitting = [size for size in GROUPS if side_by_side % size == 0 and self.first % size == 0]
        one_scale = self.scales.shape[1] == 1  # then any group size fits
        return max(fitting or GROUPS) if fitting or one_scale else None


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, words] int32 -> [n, words * 32 / bits] uint8; the lowest bits of a word come first."""
    data = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        most = (1 << bits) - 1
        return torch.stack([data >> shift & most for shift in range(0, 8, bits)], dim=-1).flatten(1)
    stream = np.unpackbits(data.numpy(), axis=1, bitorder="little")
    integers = stream[:, : stream.shape[1] // bits * bits].reshape(len(data), -1, bits)
    return torch.from_numpy(np.packbits(integers, axis=2, bitorder="little")[:, :, 0])


def word_count(integers: int, bits: int) -> int:
    """The number of int32 words that the integers take."""
    return -(-integers * bits // WORD)


def words(part: range, bits: int) -> slice:
    """The int32 words that hold these integers, and some more: only a multiple of 32 integers begins a word."""
    return slice(part.start // WORD * bits, -(-part.stop // WORD) * bits)


def within_words(part: range) -> slice:
    """The place of these integers in what words(part, bits) holds."""
    first = part.start % WORD
    return slice(first, first + len(part))


def groups(columns: range, group: int) -> slice:
    """The groups of these columns."""
    return slice(columns.start // group, -(-columns.stop // group))


def _fits(values: torch.Tensor) -> bool:
    return bool(((values.half().float() - values).abs() <= values.abs() * FLOAT16_ROUNDING).all())
