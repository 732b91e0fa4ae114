"""A matrix of a checkpoint that is stored in several tensors, and the forms in which a part of it can be read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.safetensors.files import SafetensorsFiles
from loraplex_shard.ops.quantized import Quantized

WEIGHTS_AT_A_TIME = 1 << 23
FLOATS = frozenset({"F16", "BF16", "F32"})


class Part(Protocol):
    """Some rows and columns of a matrix."""

    def dequantized(self) -> torch.Tensor:
        """Returns [rows, columns] in a float dtype."""

    def quantized(self) -> Quantized | None:
        """Returns the part in the form that the operations compute with, or None if it does not have that form."""


@dataclass(frozen=True, slots=True)
class Floats:
    """A part that cannot be had in integers."""

    weights: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        return self.weights

    def quantized(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix that can be read in parts. If experts are stored as one tensor, they are a dimension before the rows; a
    part is then some experts and some rows."""

    shape: tuple[int, ...]
    tensors: frozenset[str]  # the names of all tensors that it is stored in
    in_integers: bool  # whether most of its parts have a form of integers that the operations compute with
    read_part: Callable[[range, range], Part]
    in_float8: bool = False  # the same, if that form is float8
    in_pieces: bool = True  # whether reading a few rows costs less than reading all

    def read(self, rows: slice, columns: slice) -> Part:
        return self.read_part(range(self.shape[0])[rows], range(self.shape[1])[columns])

    def dequantized(self, rows: slice, columns: slice) -> torch.Tensor:
        """Returns a part as floats. It is computed a few rows at a time, since intermediate values take several times
        the memory of the result."""
        these, part = range(self.shape[0])[rows], range(self.shape[1])[columns]
        step = max(1, WEIGHTS_AT_A_TIME // max(1, prod(self.shape[1:]))) if self.in_pieces else len(these)
        if len(these) <= step:
            return self.read_part(these, part).dequantized()
        pieces = (self.read_part(these[start : start + step], part) for start in range(0, len(these), step))
        first = next(pieces).dequantized()
        whole = first.new_empty((len(these), *first.shape[1:]))
        whole[:step] = first
        for start, piece in enumerate(pieces, start=1):
            whole[start * step : (start + 1) * step] = piece.dequantized()
        return whole


class Layout(Protocol):
    """A way of storing matrices."""

    def find(self, files: SafetensorsFiles) -> dict[str, StoredMatrix]:
        """Finds the matrices that are stored in this way, by the names that they have in the model. Raises
        CheckpointError, naming a tensor, if one is incomplete."""


@dataclass(frozen=True, slots=True)
class Expected:
    """The dtypes and the shape that a tensor of a stored matrix must have."""

    shape: tuple[int, ...]
    dtypes: frozenset[str]


def modules(files: SafetensorsFiles, suffix: str, *dtypes: str) -> Iterator[str]:
    """The modules that have a tensor with this suffix and one of these dtypes."""
    for name in files.names:
        module, _, last = name.rpartition(".")
        if last == suffix and files.dtype(name) in dtypes:
            yield module


def matrix_shape(files: SafetensorsFiles, name: str) -> tuple[int, int]:
    shape = files.shape(name)
    if len(shape) != 2:
        raise CheckpointError(f"tensor {name} has shape {list(shape)}, but it must be a matrix")
    return shape[0], shape[1]


def check(files: SafetensorsFiles, shape: tuple[int, ...], expected: Mapping[str, Expected]) -> None:
    """Raises CheckpointError, naming the tensor, if a tensor of a matrix of this shape is missing or not as
    expected."""
    for name, must in expected.items():
        if name not in files.names:
            raise CheckpointError(f"missing tensor {name}")
        if files.shape(name) != must.shape or files.dtype(name) not in must.dtypes:
            raise CheckpointError(
                f"tensor {name} is {files.dtype(name)} {list(files.shape(name))}, but for a quantized matrix of "
                f"{' by '.join(map(str, shape))} it must be {' or '.join(sorted(must.dtypes))} {list(must.shape)}"
            )


def as_slice(part: range) -> slice:
    return slice(part.start, part.stop)
