"""Matrices as GPTQ and AWQ store them. Both transpose everything, and pack integers into int32."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.quantized.integers import (
    WORD,
    IntegerMatrix,
    groups,
    unpacked,
    within_words,
    word_count,
    words,
)
from loraplex_shard.checkpoint.quantized.stored import (
    FLOATS,
    Expected,
    StoredMatrix,
    as_slice,
    check,
    matrix_shape,
    modules,
)
from loraplex_shard.checkpoint.safetensors.files import SafetensorsFiles

INTEGERS = frozenset({"I32"})
UNSET = -1  # what compressed-tensors initializes the group of each column with

# The nibble of AWQ's int32 that holds each of its eight rows.
AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True, slots=True)
class Gptq:
    """Integers are packed along columns, zeros along rows. The first version of the format stores zeros minus 1."""

    bits: int
    group: int | None  # columns per group; None: all of them
    zeros_less: int

    def find(self, files: SafetensorsFiles) -> dict[str, StoredMatrix]:
        return _find(self, files)

    def shape(self, qweight: tuple[int, int]) -> tuple[int, int]:
        return qweight[1], qweight[0] * WORD // self.bits

    def tensors(self, rows: int, columns: int) -> Mapping[str, Expected]:
        count = _count(columns, self.group)
        return {
            "qweight": Expected((word_count(columns, self.bits), rows), INTEGERS),
            "qzeros": Expected((count, word_count(rows, self.bits)), INTEGERS),
            "scales": Expected((count, rows), FLOATS),
        }

    def read(self, files: SafetensorsFiles, module: str, width: int, rows: range, columns: range) -> IntegerMatrix:
        group = self.group or width
        order = group_order(files, f"{module}.g_idx", width, group)
        of, these_rows = groups(columns, group) if order is None else slice(None), as_slice(rows)
        values = unpacked(files.read(f"{module}.qweight", words(columns, self.bits), these_rows).T, self.bits)
        zeros = unpacked(files.read(f"{module}.qzeros", of, words(rows, self.bits)), self.bits)
        return IntegerMatrix(
            self.bits,
            group,
            columns.start % group,
            values[:, within_words(columns)],
            zeros[:, within_words(rows)].T + self.zeros_less,
            files.read(f"{module}.scales", of, these_rows).T,
            None if order is None else order[as_slice(columns)],
        )


@dataclass(frozen=True, slots=True)
class AwqGemm:
    """Integers and zeros of 4 bits are packed along rows, in a special order."""

    group: int | None

    def find(self, files: SafetensorsFiles) -> dict[str, StoredMatrix]:
        return _find(self, files)

    def shape(self, qweight: tuple[int, int]) -> tuple[int, int]:
        return qweight[1] * 8, qweight[0]

    def tensors(self, rows: int, columns: int) -> Mapping[str, Expected]:
        count = _count(columns, self.group)
        return {
            "qweight": Expected((columns, rows // 8), INTEGERS),
            "qzeros": Expected((count, rows // 8), INTEGERS),
            "scales": Expected((count, rows), FLOATS),
        }

    def read(self, files: SafetensorsFiles, module: str, width: int, rows: range, columns: range) -> IntegerMatrix:
        group = self.group or width
        of, these_words, these_rows = groups(columns, group), words(rows, 4), within_words(rows)
        values = _awq_unpacked(files.read(f"{module}.qweight", as_slice(columns), these_words))
        zeros = _awq_unpacked(files.read(f"{module}.qzeros", of, these_words))
        scales = files.read(f"{module}.scales", of, as_slice(rows)).T
        return IntegerMatrix(4, group, columns.start % group, values[:, these_rows].T, zeros[:, these_rows].T, scales)


class _Transposed(Protocol):
    def shape(self, qweight: tuple[int, int]) -> tuple[int, int]:
        """The matrix's shape, from the shape of the tensor of its integers."""

    def tensors(self, rows: int, columns: int) -> Mapping[str, Expected]:
        """The tensors of a matrix of this shape, by suffix."""

    def read(self, files: SafetensorsFiles, module: str, width: int, rows: range, columns: range) -> IntegerMatrix:
        """Reads a part of the matrix. `width` is the number of all its columns."""


def _find(layout: _Transposed, files: SafetensorsFiles) -> dict[str, StoredMatrix]:
    found = {}
    for module in modules(files, "qweight", "I32"):
        shape = layout.shape(matrix_shape(files, f"{module}.qweight"))
        expected = {f"{module}.{suffix}": tensor for suffix, tensor in layout.tensors(*shape).items()}
        check(files, shape, expected)
        tensors = frozenset(expected) | {f"{module}.g_idx"}
        found[f"{module}.weight"] = StoredMatrix(
            shape, tensors, in_integers=True, read_part=partial(layout.read, files, module, shape[1])
        )
    return found


def group_order(files: SafetensorsFiles, name: str, columns: int, group: int) -> torch.Tensor | None:
    """The group of each column, if there is a tensor `name` and it is not simply one group after the other. Raises
    CheckpointError if it does not have a group of the matrix for each column."""
    if name not in files.names:
        return None
    order, count = files.read(name).long(), -(-columns // group)
    if bool((order == UNSET).all()):
        return None
    if order.shape != (columns,) or int(order.min()) < 0 or int(order.max()) >= count:
        raise CheckpointError(
            f"tensor {name} {list(order.shape)} does not have the numbers of {count} groups for {columns} columns"
        )
    return None if torch.equal(order, torch.arange(columns) // group) else order


def _awq_unpacked(packed: torch.Tensor) -> torch.Tensor:
    """[n, words] int32 -> [n, words * 8] uint8."""
    return unpacked(packed, 4).view(len(packed), -1, 8)[:, :, AWQ_NIBBLES].flatten(1)


def _count(columns: int, group: int | None) -> int:
    return 1 if group is None else -(-columns // group)
