"""In which tensors a quantized matrix is stored: GPTQ's, AWQ's and compressed-tensors' ways. All are for matrices
[rows, columns] = [out_features, in_features] with a scale for each row and group of columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.quantized.integers import IntegerMatrix, unpacked
from loraplex_shard.checkpoint.safetensors.files import SafetensorsFiles

INTEGERS = frozenset({"I32"})  # several small ones in each
FLOATS = frozenset({"F16", "BF16", "F32"})
ORDERS = "g_idx", "weight_g_idx"  # the group of each column, where they are not one after the other

# Which nibble of an int32 of AWQ's holds each of its eight rows.
AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True, slots=True)
class Expected:
    """What a tensor of a stored matrix must be."""

    shape: tuple[int, ...]
    dtypes: frozenset[str]


class Layout(Protocol):
    """How a matrix named MODULE.weight is stored, in tensors MODULE.suffix."""

    values: ClassVar[str]  # the suffix of its integers
    other: ClassVar[frozenset[str]]  # suffixes of tensors that may be there besides, and say nothing more

    @property
    def group(self) -> int | None:
        """Columns; None: one group of all."""

    def shape(self, values: tuple[int, ...]) -> tuple[int, int]:
        """The matrix's shape, from that of its integers' tensor."""

    def tensors(self, rows: int, columns: int) -> Mapping[str, Expected]:
        """By suffix, all that a matrix of this shape consists of."""

    def read(self, files: SafetensorsFiles, module: str, rows: range, columns: range, group: int) -> IntegerMatrix:
        """`group` is the matrix's own."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """Integers packed along columns, zeros along rows; everything transposed. The first version's zeros are 1 less."""

    bits: int
    group: int | None
    zeros_less: int
    values: ClassVar = "qweight"
    other: ClassVar = frozenset({"g_idx"})

    def shape(self, values: tuple[int, ...]) -> tuple[int, int]:
        return values[1], values[0] * (32 // self.bits)

    def tensors(self, rows: int, columns: int) -> Mapping[str, Expected]:
        groups, per_word = _groups(columns, self.group), 32 // self.bits
        return {
            "qweight": Expected((columns // per_word, rows), INTEGERS),
            "qzeros": Expected((groups, -(-rows // per_word)), INTEGERS),
            "scales": Expected((groups, rows), FLOATS),
        }

    def read(self, files: SafetensorsFiles, module: str, rows: range, columns: range, group: int) -> IntegerMatrix:
        words, groups, these_rows = _words(columns, self.bits), _slice_of_groups(columns, group), _slice(rows)
        values = unpacked(files.read(f"{module}.qweight", words, these_rows).T, self.bits)
        zeros = unpacked(files.read(f"{module}.qzeros", groups, _words(rows, self.bits)), self.bits)
        return IntegerMatrix(
            self.bits,
            group,
            columns.start % group,
            values[:, _within_words(columns, self.bits)],
            zeros[:, _within_words(rows, self.bits)].T + self.zeros_less,
            files.read(f"{module}.scales", groups, these_rows).T,
        )


@dataclass(frozen=True, slots=True)
class AwqGemm:
    """Integers and zeros of 4 bits packed along rows, in an order of their own; everything transposed."""

    group: int | None
    values: ClassVar = "qweight"
    other: ClassVar = frozenset[str]()

    def shape(self, values: tuple[int, ...]) -> tuple[int, int]:
        return values[1] * 8, values[0]

    def tensors(self, rows: int, columns: int) -> Mapping[str, Expected]:
        groups = _groups(columns, self.group)
        return {
            "qweight": Expected((columns, rows // 8), INTEGERS),
            "qzeros": Expected((groups, rows // 8), INTEGERS),
            "scales": Expected((groups, rows), FLOATS),
        }

    def read(self, files: SafetensorsFiles, module: str, rows: range, columns: range, group: int) -> IntegerMatrix:
        words, groups, these_rows = _words(rows, 4), _slice_of_groups(columns, group), _within_words(rows, 4)
        values = _awq_unpacked(files.read(f"{module}.qweight", _slice(columns), words))
        zeros = _awq_unpacked(files.read(f"{module}.qzeros", groups, words))
        scales = files.read(f"{module}.scales", groups, _slice(rows)).T
        return IntegerMatrix(4, group, columns.start % group, values[:, these_rows].T, zeros[:, these_rows].T, scales)


@dataclass(frozen=True, slots=True)
class PackQuantized:
    """compressed-tensors: integers packed along columns, zeros (if not symmetric) along rows."""

    bits: int
    group: int | None
    symmetric: bool
    values: ClassVar = "weight_packed"
    other: ClassVar = frozenset({"weight_shape", "weight_g_idx", "weight_zero_point"})

    def shape(self, values: tuple[int, ...]) -> tuple[int, int]:
        return values[0], values[1] * (32 // self.bits)

    def tensors(self, rows: int, columns: int) -> Mapping[str, Expected]:
        groups, per_word = _groups(columns, self.group), 32 // self.bits
        tensors = {
            "weight_packed": Expected((rows, columns // per_word), INTEGERS),
            "weight_scale": Expected((rows, groups), FLOATS),
        }
        if not self.symmetric:
            tensors["weight_zero_point"] = Expected((-(-rows // per_word), groups), INTEGERS)
        return tensors

    def read(self, files: SafetensorsFiles, module: str, rows: range, columns: range, group: int) -> IntegerMatrix:
        groups, these_rows = _slice_of_groups(columns, group), _slice(rows)
        values = unpacked(files.read(f"{module}.weight_packed", these_rows, _words(columns, self.bits)), self.bits)
        scales = files.read(f"{module}.weight_scale", these_rows, groups)
        if self.symmetric:
            zeros = torch.full(scales.shape, 1 << (self.bits - 1), dtype=torch.uint8)
        else:
            packed = files.read(f"{module}.weight_zero_point", _words(rows, self.bits), groups)
            zeros = unpacked(packed.T, self.bits)[:, _within_words(rows, self.bits)].T
        values = values[:, _within_words(columns, self.bits)]
        return IntegerMatrix(self.bits, group, columns.start % group, values, zeros, scales)


@dataclass(frozen=True, slots=True)
class IntQuantized:
    """compressed-tensors: symmetric int8 in a tensor that has the matrix's own name."""

    group: int | None
    values: ClassVar = "weight"
    other: ClassVar = frozenset({"weight_zero_point", "input_scale", "input_zero_point"})

    def shape(self, values: tuple[int, ...]) -> tuple[int, int]:
        return values[0], values[1]

    def tensors(self, rows: int, columns: int) -> Mapping[str, Expected]:
        return {
            "weight": Expected((rows, columns), frozenset({"I8"})),
            "weight_scale": Expected((rows, _groups(columns, self.group)), FLOATS),
        }

    def read(self, files: SafetensorsFiles, module: str, rows: range, columns: range, group: int) -> IntegerMatrix:
        values = files.read(f"{module}.weight", _slice(rows), _slice(columns)).contiguous().view(torch.uint8) ^ 128
        scales = files.read(f"{module}.weight_scale", _slice(rows), _slice_of_groups(columns, group))
        zeros = torch.full(scales.shape, 128, dtype=torch.uint8)
        return IntegerMatrix(8, group, columns.start % group, values, zeros, scales)


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One matrix of a checkpoint, of which parts can be read."""

    files: SafetensorsFiles
    module: str
    layout: Layout
    shape: tuple[int, int]

    def read(self, rows: slice, columns: slice) -> IntegerMatrix:
        these_rows, these_columns = range(self.shape[0])[rows], range(self.shape[1])[columns]
        return self.layout.read(self.files, self.module, these_rows, these_columns, self.layout.group or self.shape[1])

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all that it is stored in."""
        suffixes = self.layout.tensors(*self.shape).keys() | self.layout.other
        return frozenset(f"{self.module}.{suffix}" for suffix in suffixes)


def find_matrices(files: SafetensorsFiles, layout: Layout) -> dict[str, StoredMatrix]:
    """The matrices that are stored so, by name. Raises CheckpointError, naming a tensor, for one that is not whole."""
    matrices = {}
    for name in files.names:
        module, _, suffix = name.rpartition(".")
        if suffix != layout.values or not files.dtype(name).startswith("I"):
            continue
        shape = files.shape(name)
        if len(shape) != 2:
            raise CheckpointError(f"tensor {name} has shape {list(shape)}, but it must be a matrix")
        matrix = StoredMatrix(files, module, layout, layout.shape(shape))
        _check(matrix)
        matrices[f"{module}.weight"] = matrix
    return matrices


def _check(matrix: StoredMatrix) -> None:
    files, (rows, columns) = matrix.files, matrix.shape
    for suffix, expected in matrix.layout.tensors(rows, columns).items():
        name = f"{matrix.module}.{suffix}"
        if name not in files.names:
            raise CheckpointError(f"missing tensor {name}")
        if files.shape(name) != expected.shape or files.dtype(name) not in expected.dtypes:
            raise CheckpointError(
                f"tensor {name} is {files.dtype(name)} {list(files.shape(name))}, but for a quantized matrix of "
                f"{rows} by {columns} it must be {' or '.join(sorted(expected.dtypes))} {list(expected.shape)}"
            )
    in_order = torch.arange(columns) // (matrix.layout.group or columns)
    for name in (f"{matrix.module}.{suffix}" for suffix in ORDERS):
        if name in files.names and not torch.equal(files.read(name).long(), in_order):
            raise CheckpointError(f"tensor {name}: groups of columns that are not side by side are not served")


def _awq_unpacked(words: torch.Tensor) -> torch.Tensor:
    """[n, words] int32 -> [n, words * 8] uint8."""
    return unpacked(words, 4).view(len(words), -1, 8)[:, :, AWQ_NIBBLES].flatten(1)


def _groups(columns: int, group: int | None) -> int:
    return 1 if group is None else -(-columns // group)


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)


def _slice_of_groups(columns: range, group: int) -> slice:
    return slice(columns.start // group, -(-columns.stop // group))


def _words(part: range, bits: int) -> slice:
    """The words that hold these integers, and maybe some more."""
    return _slice_of_groups(part, 32 // bits)


def _within_words(part: range, bits: int) -> slice:
    """Where these integers are in what _words(part) holds."""
    first = part.start % (32 // bits)
    return slice(first, first + len(part))
