"""Layers that load themselves: each parameter names the slices of checkpoint tensors that it is made of."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

from loraplex_shard.ops.base import Operations, Weight
from loraplex_shard.ops.quantized import Form, Quantized, fits_float8, joined, rounded
from loraplex_shard.settings import Quantize

FLOAT = 16  # bits of a matrix that is never rounded


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A slice of a checkpoint's tensor. The rows of a parameter are those of its slices, one slice after the other."""

    tensor: str
    shape: tuple[int, ...]  # the shape that the whole tensor must have
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    repeat: int | None = None  # a vector becomes this many equal rows; None: it is cut into rows
    expert: int | None = None  # if the tensor holds those of all experts: the expert whose matrix or vector it is
    transposed: bool = False  # in the tensor, the matrix's columns come before its rows
    instead: "TensorSlice | None" = None  # what to read if this tensor is missing or has another shape

    def chosen(self, reader: "TensorReader") -> "TensorSlice":
        """Returns this slice or, if the checkpoint does not have its tensor in its shape, what to read instead."""
        options = [self]
        while (other := options[-1].instead) is not None:
            options.append(other)
        there = [each for each in options if each.tensor in reader.names]
        fitting = [each for each in there if reader.shape(each.tensor) == each.shape]
        return (fitting or there or options[-1:])[0]

    def read(self, reader: "TensorReader") -> torch.Tensor:
        if self.expert is None:
            return reader.read(self.tensor, self.rows, self.columns)
        own = reader.read(self.tensor, slice(self.expert, self.expert + 1))[0]
        own = own.T if self.transposed else own
        return own[self.rows] if own.dim() == 1 else own[self.rows, self.columns]

    def read_quantized(self, reader: "TensorReader") -> Quantized | None:
        if self.expert is None:
            return reader.read_quantized(self.tensor, self.rows, self.columns)
        own = reader.read_quantized(self.tensor, slice(self.expert, self.expert + 1))
        return None if own is None else own.part(self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter that a layer declared."""

    slices: tuple[TensorSlice, ...]
    dtype: torch.dtype | None  # None: the model's
    plus: float  # added to each number


class TensorReader(Protocol):
    """The part of a checkpoint that a layer needs."""

    @property
    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, rows: slice = ..., columns: slice = ...) -> torch.Tensor: ...

    def read_quantized(self, name: str, rows: slice = ..., columns: slice = ...) -> Quantized | None:
        """For a tensor of experts, `rows` is a single expert, and its matrix [out_features, in_features] is
        returned."""


@dataclass(frozen=True, slots=True)
class ParameterForm:
    """The form that parameters get when they are loaded."""

    dtype: torch.dtype
    device: torch.device
    quantize: Quantize  # how matrices are quantized; auto: they stay in integers or float8 if they are stored so
    keeps_float8: bool = False  # whether they do for auto: the device multiplies float8


class LoadableLayer(nn.Module):
    """A layer that loads its own parameters. Until then, they are on the meta device."""

    weight: Weight  # for layers with a matrix, once it is loaded

    def __init__(self, ops: Operations) -> None:
        super().__init__()
        self.ops = ops
        self.declared: dict[str, Parameter] = {}
        self.matrix: tuple[TensorSlice, ...] = ()

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        *slices: TensorSlice,
        dtype: torch.dtype | None = None,
        plus: float = 0.0,
    ) -> None:
        """Registers parameter `name`, to be filled from `slices`. It has this dtype, or the model's if that is None,
        and `plus` is added to each number."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))
        self.declared[name] = Parameter(slices, dtype, plus)

    def declare_matrix(self, shape: tuple[int, int], *slices: TensorSlice, least_bits: int = 4) -> None:
        """Registers the matrix that becomes `weight`. Its rows come from `slices`.

        If the model is quantized to fewer bits than `least_bits`, this matrix has int8 for int4, and else floats.
        """
        self.matrix_shape = shape
        self.matrix = slices
        self.least_bits = least_bits

    @property
    def all_slices(self) -> tuple[TensorSlice, ...]:
        return (
            *self.matrix,
            *(tensor_slice for parameter in self.declared.values() for tensor_slice in parameter.slices),
        )

    def choose_slices(self, reader: "TensorReader") -> None:
        """Replaces slices of tensors that the checkpoint does not have by what to read instead."""
        self.matrix = tuple(each.chosen(reader) for each in self.matrix)
        for name, declared in self.declared.items():
            chosen = tuple(each.chosen(reader) for each in declared.slices)
            self.declared[name] = replace(declared, slices=chosen)

    def load(self, reader: TensorReader, form: ParameterForm) -> Iterator[str]:
        """Fills the parameters, in their final form and place, tensor by tensor. Yields each tensor's name."""
        for name, declared in self.declared.items():
            self.register_parameter(name, nn.Parameter(self.read_parameter(name, reader, form), requires_grad=False))
            yield from (tensor_slice.tensor for tensor_slice in declared.slices)
        if self.matrix:
            yield from self._load_matrix(reader, form)

    def read_parameter(self, name: str, reader: TensorReader, form: ParameterForm) -> torch.Tensor:
        """Returns a declared parameter in its final form and place."""
        declared = self.declared[name]
        shape, dtype = self.get_parameter(name).shape, declared.dtype or form.dtype
        data = torch.empty(shape, dtype=dtype, device=form.device)
        for _ in _fill(data, reader, declared.slices):
            pass
        return data.add_(declared.plus)

    def as_served(self, reader: TensorReader, form: ParameterForm, tensor_slice: TensorSlice) -> torch.Tensor:
        """Returns a slice of one of the matrix's tensors as the layer computes with it in this form, in float32."""
        stored = self._stored(reader, form, (tensor_slice,))
        if stored is not None:
            return stored.dequantized()
        matrix, wanted = tensor_slice.read(reader), self._wanted(form)
        return matrix.to(form.dtype).float() if wanted is None else rounded(matrix.float(), wanted).dequantized()

    def _load_matrix(self, reader: TensorReader, form: ParameterForm) -> Iterator[str]:
        stored = self._stored(reader, form, self.matrix)
        if stored is not None:
            self.weight = self.ops.pack(stored)
            yield from (tensor_slice.tensor for tensor_slice in self.matrix)
            return
        wanted = self._wanted(form)
        data = torch.empty(self.matrix_shape, dtype=torch.float32 if wanted else form.dtype, device=form.device)
        yield from _fill(data, reader, self.matrix)
        self.weight = self.ops.pack(rounded(data, wanted) if wanted else data)

    def _stored(self, reader: TensorReader, form: ParameterForm, slices: tuple[TensorSlice, ...]) -> Quantized | None:
        """The matrix in the checkpoint's numbers, if all of it is stored in the same form, and that is the wanted
        one."""
        if form.quantize == "none":
            return None
        parts = [tensor_slice.read_quantized(reader) for tensor_slice in slices]
        stored = [part for part in parts if part is not None]
        whole = joined(stored) if len(stored) == len(parts) else None
        if whole is None or (whole.form == "fp8" and not self._may_be_float8):
            return None
        if form.quantize == "auto":
            return whole if whole.form != "fp8" or form.keeps_float8 else None
        return whole if whole.form == self._wanted(form) else None

    @property
    def _may_be_float8(self) -> bool:
        return self.least_bits < 8 and fits_float8(self.matrix_shape)

    def _wanted(self, form: ParameterForm) -> Form | None:
        """The form that the matrix is rounded to, if any."""
        if form.quantize == "auto" or form.quantize == "none" or self.least_bits == FLOAT:
            return None
        if form.quantize == "fp8":
            return "fp8" if self._may_be_float8 else None
        return "int8" if self.least_bits == 8 else form.quantize


def _fill(data: torch.Tensor, reader: TensorReader, slices: tuple[TensorSlice, ...]) -> Iterator[str]:
    row = 0
    for tensor_slice in slices:
        piece = tensor_slice.read(reader)
        if piece.dim() < data.dim():
            piece = piece.view(-1, data.shape[1]).expand(tensor_slice.repeat or -1, -1)
        data[row : row + piece.shape[0]].copy_(piece)
        row += piece.shape[0]
        yield tensor_slice.tensor
    assert row == data.shape[0]
