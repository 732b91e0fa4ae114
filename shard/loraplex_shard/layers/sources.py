"""Where a layer's parameters come from: which slices of which checkpoint tensors, so that a layer loads itself."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

from loraplex_shard.ops.base import Operations, Weight
from loraplex_shard.ops.quantized import QuantizedMatrix, joined, quantize
from loraplex_shard.settings import Quantize

BITS: dict[Quantize, int] = {"int8": 8, "int4": 4}
FLOAT = 16  # bits of a matrix that is never rounded


@dataclass(frozen=True, slots=True)
class Source:
    """A slice of one checkpoint tensor. A parameter is its sources' rows one after the other."""

    tensor: str
    shape: tuple[int, ...]  # that the whole tensor must have
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    repeat: int | None = None  # how many equal rows a vector becomes; None: rows one after the other
    expert: int | None = None  # of a tensor that holds those of all experts: whose matrix or vector it is
    transposed: bool = False  # the tensor has a matrix's columns before its rows
    instead: "Source | None" = None  # of what other checkpoints have in place of this tensor

    def read(self, reader: "TensorReader") -> torch.Tensor:
        if self.expert is None:
            return reader.read(self.tensor, self.rows, self.columns)
        own = reader.read(self.tensor, slice(self.expert, self.expert + 1))[0]
        own = own.T if self.transposed else own
        return own[self.rows] if own.dim() == 1 else own[self.rows, self.columns]

    def read_quantized(self, reader: "TensorReader") -> QuantizedMatrix | None:
        if self.expert is None:
            return reader.read_quantized(self.tensor, self.rows, self.columns)
        own = reader.read_quantized(self.tensor, slice(self.expert, self.expert + 1))
        return None if own is None else own.part(self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One that a layer declared."""

    sources: tuple[Source, ...]
    dtype: torch.dtype | None  # None: the model's
    plus: float  # is added to each number


class TensorReader(Protocol):
    """The part of a checkpoint that a layer needs."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, rows: slice = ..., columns: slice = ...) -> torch.Tensor: ...

    def read_quantized(self, name: str, rows: slice = ..., columns: slice = ...) -> QuantizedMatrix | None:
        """Of a tensor of experts: the one expert's matrix that `rows` asks for, [out_features, in_features]."""


@dataclass(frozen=True, slots=True)
class ParameterForm:
    """What parameters become when they are loaded."""

    dtype: torch.dtype
    device: torch.device
    quantize: Quantize  # what becomes of matrices; auto: they stay in integers if they are stored so


class SourcedLayer(nn.Module):
    """A layer that says where its parameters come from. They are on the meta device until it loads them."""

    weight: Weight  # of those that have a matrix, once it is loaded

    def __init__(self, ops: Operations) -> None:
        super().__init__()
        self.ops = ops
        self.declared: dict[str, Parameter] = {}
        self.matrix: tuple[Source, ...] = ()

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        *sources: Source,
        dtype: torch.dtype | None = None,
        plus: float = 0.0,
    ) -> None:
        """Registers parameter `name`, to be filled from `sources`: of this dtype, or the model's; with `plus` added to
        each number."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))
        self.declared[name] = Parameter(sources, dtype, plus)

    def declare_matrix(self, shape: tuple[int, int], *sources: Source, least_bits: int = 4) -> None:
        """Has `weight` made from `sources`, its rows, in the form that the layer's operation takes.

        However coarsely the model is rounded, this matrix is to `least_bits` at least.
        """
        self.matrix_shape = shape
        self.matrix = sources
        self.least_bits = least_bits

    @property
    def all_sources(self) -> tuple[Source, ...]:
        return (*self.matrix, *(source for parameter in self.declared.values() for source in parameter.sources))

    def choose_sources(self, names: Collection[str]) -> None:
        """Takes those that a checkpoint with tensors of these names has."""

        def chosen(sources: tuple[Source, ...]) -> tuple[Source, ...]:
            return tuple(s.instead if s.instead and s.tensor not in names else s for s in sources)

        self.matrix = chosen(self.matrix)
        self.declared = {name: replace(each, sources=chosen(each.sources)) for name, each in self.declared.items()}

    def load(self, reader: TensorReader, form: ParameterForm) -> Iterator[str]:
        """Fills the parameters in their final form and place, tensor by tensor; yields each tensor's name."""
        for name, declared in self.declared.items():
            shape, dtype = self.get_parameter(name).shape, declared.dtype or form.dtype
            data = torch.empty(shape, dtype=dtype, device=form.device)
            yield from _fill(data, reader, declared.sources)
            self.register_parameter(name, nn.Parameter(data.add_(declared.plus), requires_grad=False))
        if self.matrix:
            yield from self._load_matrix(reader, form)

    def as_served(self, reader: TensorReader, form: ParameterForm, source: Source) -> torch.Tensor:
        """What this slice of one of the matrix's tensors becomes in that form, as float32."""
        stored = self._stored_integers(reader, form.quantize, (source,))
        if stored is not None:
            return stored.dequantized()
        matrix = source.read(reader)
        if self._is_rounded(form):
            return quantize(matrix.float(), self._bits(form.quantize)).dequantized()
        return matrix.to(form.dtype).float()

    def _load_matrix(self, reader: TensorReader, form: ParameterForm) -> Iterator[str]:
        stored = self._stored_integers(reader, form.quantize, self.matrix)
        if stored is not None:
            self.weight = self.ops.pack(stored)
            yield from (source.tensor for source in self.matrix)
            return
        rounded = self._is_rounded(form)
        data = torch.empty(self.matrix_shape, dtype=torch.float32 if rounded else form.dtype, device=form.device)
        yield from _fill(data, reader, self.matrix)
        self.weight = self.ops.pack(quantize(data, self._bits(form.quantize)) if rounded else data)

    def _stored_integers(
        self, reader: TensorReader, wanted: Quantize, sources: tuple[Source, ...]
    ) -> QuantizedMatrix | None:
        """The matrix as the checkpoint holds it, if all of its sources are of one form, and that is the one wanted."""
        if wanted == "none":
            return None
        parts = [source.read_quantized(reader) for source in sources]
        stored = [part for part in parts if part is not None]
        if len(stored) < len(parts) or len({(part.bits, part.group) for part in stored}) > 1:
            return None
        return joined(stored) if wanted == "auto" or stored[0].bits == self._bits(wanted) else None

    def _is_rounded(self, form: ParameterForm) -> bool:
        return form.quantize in BITS and self.least_bits < FLOAT

    def _bits(self, wanted: Quantize) -> int:
        return max(BITS[wanted], self.least_bits)


def _fill(data: torch.Tensor, reader: TensorReader, sources: tuple[Source, ...]) -> Iterator[str]:
    row = 0
    for source in sources:
        piece = source.read(reader)
        if piece.dim() < data.dim():
            piece = piece.view(-1, data.shape[1]).expand(source.repeat or -1, -1)
        data[row : row + piece.shape[0]].copy_(piece)
        row += piece.shape[0]
        yield source.tensor
    assert row == data.shape[0]
