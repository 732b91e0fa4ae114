"""Matrices that compressed-tensors stores in integers. Their bits and groups follow from their tensors, since layers of
a model may differ."""

from dataclasses import dataclass
from math import prod

import torch

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.quantized.gptq import INTEGERS, group_order
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


@dataclass(frozen=True, slots=True)
class CompressedIntegers:
    """Signed integers with a scale, and maybe a zero, for each row and group of columns. They are packed into int32 in
    the order of the matrix (`weight_packed`), or are int8 under the matrix's own name."""

    asymmetric: bool = False  # each matrix must have zeros
    groups: frozenset[int | None] = frozenset()  # columns of the groups that there may be; None: all. Empty: any

    def find(self, files: SafetensorsFiles) -> dict[str, StoredMatrix]:
        packed = {module: _packed(files, module) for module in modules(files, "weight_packed", "I32")}
        plain = {module: _plain(files, module) for module in modules(files, "weight", "I8")}
        for module in packed | plain if self.asymmetric else ():
            if (zeros := f"{module}.weight_zero_point") not in files.names:
                raise CheckpointError(f"missing tensor {zeros}: config.json says that weights are not symmetric")
        for module, matrix in (packed | plain).items() if self.groups else ():
            (_, columns), (_, count) = matrix.shape, matrix.scales
            if self.groups.isdisjoint((columns // count, *([None] if count == 1 else []))):
                raise CheckpointError(
                    f"tensor {module}.weight_scale has {count} groups of {columns} columns, but config.json says that "
                    f"groups have {' or '.join(str(each or 'all') for each in self.groups)}"
                )
        return {f"{module}.weight": matrix.stored() for module, matrix in (packed | plain).items()}


@dataclass(frozen=True, slots=True)
class _Matrix:
    files: SafetensorsFiles
    module: str
    shape: tuple[int, int]
    bits: int
    packed: bool
    scales: tuple[int, int]  # their shape: a row for each row or one for all, a column for each group

    def stored(self) -> StoredMatrix:
        suffixes = "weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"
        tensors = frozenset(f"{self.module}.{suffix}" for suffix in suffixes)
        return StoredMatrix(self.shape, tensors, in_integers=True, read_part=self.read)

    def read(self, rows: range, columns: range) -> IntegerMatrix:
        group = -(-self.shape[1] // self.scales[1])
        order = group_order(self.files, f"{self.module}.weight_g_idx", self.shape[1], group)
        of = groups(columns, group) if order is None else slice(None)
        scales = self._per_group("weight_scale", rows, of)
        return IntegerMatrix(
            self.bits,
            group,
            columns.start % group,
            self._values(rows, columns),
            self._zeros(rows, of).expand(scales.shape),
            scales,
            None if order is None else order[as_slice(columns)],
        )

    def _values(self, rows: range, columns: range) -> torch.Tensor:
        if not self.packed:
            values = self.files.read(f"{self.module}.weight", as_slice(rows), as_slice(columns))
            return _unsigned(values, self.bits)
        packed = self.files.read(f"{self.module}.weight_packed", as_slice(rows), words(columns, self.bits))
        return unpacked(packed, self.bits)[:, within_words(columns)]

    def _zeros(self, rows: range, of: slice) -> torch.Tensor:
        name = f"{self.module}.weight_zero_point"
        if name not in self.files.names:
            return torch.full((1, 1), 1 << (self.bits - 1), dtype=torch.uint8)
        if self.files.dtype(name) != "I32":
            return _unsigned(self._per_group("weight_zero_point", rows, of), self.bits)
        packed = self.files.read(name, words(rows, self.bits), of)  # packed along rows
        return unpacked(packed.T, self.bits)[:, within_words(rows)].T

    def _per_group(self, suffix: str, rows: range, of: slice) -> torch.Tensor:
        tensor = self.files.read(f"{self.module}.{suffix}").view(self.scales)[:, of]
        return tensor[as_slice(rows)] if len(tensor) > 1 else tensor.expand(len(rows), -1)


def _packed(files: SafetensorsFiles, module: str) -> _Matrix:
    name = f"{module}.weight_packed"
    check(files, (), {f"{module}.weight_shape": Expected((2,), frozenset({"I64", "I32"}))})
    rows, columns = map(int, files.read(f"{module}.weight_shape"))
    bits = WORD * matrix_shape(files, name)[1] // max(1, columns)
    if not 1 <= bits <= 8:
        raise CheckpointError(f"tensor {name} {list(files.shape(name))} and {columns} columns in {module}.weight_shape")
    scales = _scales(files, module, rows, columns)
    expected = {name: Expected((rows, word_count(columns, bits)), INTEGERS)}
    zeros = f"{module}.weight_zero_point"
    if zeros in files.names and files.dtype(zeros) == "I32":
        expected[zeros] = Expected((word_count(rows, bits), scales[1]), INTEGERS)
    else:
        _check_plain_zeros(files, zeros, scales)
    check(files, (rows, columns), expected)
    return _Matrix(files, module, (rows, columns), bits, True, scales)


def _plain(files: SafetensorsFiles, module: str) -> _Matrix:
    shape = matrix_shape(files, f"{module}.weight")
    scales = _scales(files, module, *shape)
    _check_plain_zeros(files, f"{module}.weight_zero_point", scales)
    return _Matrix(files, module, shape, 8, False, scales)


def _check_plain_zeros(files: SafetensorsFiles, name: str, scales: tuple[int, int]) -> None:
    """Checks zeros that are not packed, if there are any."""
    if name in files.names and (files.dtype(name) != "I8" or prod(files.shape(name)) != prod(scales)):
        raise CheckpointError(
            f"tensor {name} is {files.dtype(name)} {list(files.shape(name))}, but it must be I8 {list(scales)}"
        )


def _scales(files: SafetensorsFiles, module: str, rows: int, columns: int) -> tuple[int, int]:
    """The shape of the scales, as a matrix's."""
    name = f"{module}.weight_scale"
    if name not in files.names:
        raise CheckpointError(f"missing tensor {name}")
    shape = (*files.shape(name), 1, 1)[:2]
    fits = shape == (1, 1) or (shape[0] == rows and shape[1] > 0 and columns % shape[1] == 0)
    if files.dtype(name) not in FLOATS or not fits:
        raise CheckpointError(
            f"tensor {name} is {files.dtype(name)} {list(files.shape(name))}, but it must be "
            f"{' or '.join(sorted(FLOATS))} with {rows} rows and a number for each group of columns, or one number"
        )
    return shape[0], shape[1]


def _unsigned(integers: torch.Tensor, bits: int) -> torch.Tensor:
    return (integers.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
