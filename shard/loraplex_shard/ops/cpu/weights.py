"""Weights in the form that the CPU's kernels read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from loraplex_shard.kernels.library import KINDS, Kernels
from loraplex_shard.kernels.tables import row
from loraplex_shard.ops.quantized import Float8Matrix, Quantized, QuantizedMatrix

PANEL = 16  # rows in a panel of a weight, and positions in a block of the cache


@dataclass(frozen=True, slots=True)
class FloatWeight:
    """Panels as linear.cpp describes them."""

    panels: torch.Tensor  # [panels, values per panel] in the model's dtype
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def part(self, rows: slice) -> "FloatWeight":
        return FloatWeight(_panels(self.panels, rows), rows.stop - rows.start, self.columns)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "FloatWeight":
        return replace(self, panels=function(self.panels))


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """Panels as quantized.cpp describes them."""

    panels: torch.Tensor  # [panels, bytes per panel] uint8
    rows: int
    columns: int
    bits: int
    group: int

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def part(self, rows: slice) -> "IntegerWeight":
        return IntegerWeight(_panels(self.panels, rows), rows.stop - rows.start, self.columns, self.bits, self.group)


CpuWeight = FloatWeight | IntegerWeight


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights and biases of all experts of a layer."""

    weights: Sequence[CpuWeight]
    biases: Sequence[torch.Tensor | None]
    table: torch.Tensor = field(init=False)  # int64: an Expert (see kernels/csrc/tables.h) for each

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", torch.tensor(list(map(_row, self.weights, self.biases))))


def _row(weight: CpuWeight, bias: torch.Tensor | None) -> list[int]:
    bits, group = (weight.bits, weight.group) if isinstance(weight, IntegerWeight) else (0, 0)
    return row(
        "Expert",
        weight=weight.panels.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        bits=bits,
        group=group,
    )


def _panels(panels: torch.Tensor, rows: slice) -> torch.Tensor:
    assert rows.start % PANEL == 0
    return panels[rows.start // PANEL : -(-rows.stop // PANEL)]


def pack(kernels: Kernels, matrix: torch.Tensor | Quantized) -> CpuWeight:
    """Packs a matrix [out_features, in_features] into panels."""
    assert not isinstance(matrix, Float8Matrix), "float8 is for GPUs"
    if isinstance(matrix, QuantizedMatrix):
        return _pack_integers(kernels, matrix)
    rows, columns = matrix.shape
    matrix = matrix.contiguous()
    panels = matrix.new_empty((-(-rows // PANEL), PANEL * (columns + columns % 2 * (matrix.itemsize == 2))))
    kernels.call(
        "pack_weight",
        kind=KINDS[matrix.dtype],
        n=rows,
        k=columns,
        weight=matrix.data_ptr(),
        packed=panels.data_ptr(),
    )
    return FloatWeight(panels, rows, columns)


def _pack_integers(kernels: Kernels, matrix: QuantizedMatrix) -> IntegerWeight:
    rows, columns = matrix.values.shape
    form = {"bits": matrix.bits, "group": matrix.group}
    size = kernels.call("quantized_bytes", n=rows, k=columns, **form)
    panels = torch.empty((-(-rows // PANEL), size // -(-rows // PANEL)), dtype=torch.uint8)
    offsets = None if matrix.offsets is None else matrix.offsets.contiguous()
    values, scales = matrix.values.contiguous(), matrix.scales.contiguous()
    kernels.call(
        "pack_quantized",
        n=rows,
        k=columns,
        values=values.data_ptr(),
        scales=scales.data_ptr(),
        offsets=None if offsets is None else offsets.data_ptr(),
        packed=panels.data_ptr(),
        **form,
    )
    return IntegerWeight(panels, rows, columns, matrix.bits, matrix.group)
