"""The operations on the CPU, computed by the kernels in csrc/. Every method is one call of a kernel.

Tensors are float32 or bfloat16 and contiguous. Kernels run on torch's threads and on the calling thread; they keep
memory for intermediate values from call to call, so that a step allocates only its results.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

from loraplex_shard.batch import Batch, Segment
from loraplex_shard.cache import LayerCache
from loraplex_shard.layers.layout import LinearLayout
from loraplex_shard.ops.base import HeadNorms, Heads
from loraplex_shard.ops.quantized import QuantizedMatrix

KINDS = {torch.float32: 0, torch.bfloat16: 1}
PANEL = 16  # rows of a weight that lie together, and positions of a block of the cache


@dataclass(frozen=True, slots=True)
class FloatWeight:
    """Panels as linear.cpp describes them."""

    panels: torch.Tensor  # [panels, values of a panel], of the model's dtype
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def part(self, rows: slice) -> "FloatWeight":
        return FloatWeight(_panels(self.panels, rows), rows.stop - rows.start, self.columns)


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """Panels as quantized.cpp describes them."""

    panels: torch.Tensor  # [panels, bytes of a panel] uint8
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
class CpuStep:
    batch: Batch
    cos: torch.Tensor
    sin: torch.Tensor
    starts: np.ndarray[tuple[int], np.dtype[np.int64]]
    contexts: np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class CpuSegments:
    starts: np.ndarray[tuple[int], np.dtype[np.int64]]
    stops: np.ndarray[tuple[int], np.dtype[np.int64]]
    tables: np.ndarray[tuple[int], np.dtype[np.int64]]  # addresses of the adapters' tables
    int8: bool


class CpuOperations:
    """Implements loraplex_shard.ops.base.Operations; the docstrings there hold. Cache blocks have 16 positions."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._kernels = library
        self._threads = torch.get_num_threads()

    def pack(self, matrix: torch.Tensor | QuantizedMatrix) -> CpuWeight:
        if isinstance(matrix, QuantizedMatrix):
            return self._pack_integers(matrix)
        rows, columns = matrix.shape
        matrix = matrix.contiguous()
        panels = matrix.new_empty((-(-rows // PANEL), PANEL * (columns + columns % 2 * (matrix.itemsize == 2))))
        self._kernels.pack_weight(KINDS[matrix.dtype], rows, columns, matrix.data_ptr(), panels.data_ptr())
        return FloatWeight(panels, rows, columns)

    def prepare(self, batch: Batch, cos: torch.Tensor, sin: torch.Tensor) -> CpuStep:
        return CpuStep(batch, cos, sin, np.array(batch.starts, np.int64), np.array(batch.context_lengths, np.int64))

    def segments(self, segments: tuple[Segment, ...]) -> CpuSegments | None:
        if not segments:
            return None
        return CpuSegments(
            np.array([segment.start for segment in segments], np.int64),
            np.array([segment.stop for segment in segments], np.int64),
            np.array([segment.adapter.table.data_ptr() for segment in segments], np.int64),
            segments[0].adapter.int8,
        )

    def embedding(self, token_ids: torch.Tensor, weight: CpuWeight, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty((len(token_ids), weight.columns), dtype=dtype)
        where = self._threads, KINDS[dtype], len(token_ids), token_ids.data_ptr(), weight.columns
        if isinstance(weight, IntegerWeight):
            self._kernels.quantized_rows(*where, weight.bits, weight.group, weight.panels.data_ptr(), out.data_ptr())
        else:
            self._kernels.weight_rows(*where, weight.panels.data_ptr(), out.data_ptr())
        return out

    def linear(self, x: torch.Tensor, weight: CpuWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = x.new_empty((len(x), weight.rows))
        where = self._threads, KINDS[x.dtype], len(x), weight.rows, weight.columns, x.data_ptr()
        to = weight.panels.data_ptr(), _address(bias), out.data_ptr()
        if isinstance(weight, IntegerWeight):
            self._kernels.quantized_linear(*where, weight.bits, weight.group, *to)
        else:
            self._kernels.linear(*where, *to)
        return out

    def add_lora_delta(
        self, out: torch.Tensor, x: torch.Tensor, segments: CpuSegments | None, layout: LinearLayout
    ) -> None:
        if segments is None:
            return
        self._kernels.add_lora_delta(
            self._threads,
            KINDS[x.dtype],
            segments.int8,
            len(segments.starts),
            segments.starts.ctypes.data,
            segments.stops.ctypes.data,
            segments.tables.ctypes.data,
            layout.index,
            x.data_ptr(),
            x.shape[1],
            out.data_ptr(),
            out.shape[1],
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._norm(x, None, weight, eps)

    def add_rms_norm(self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._norm(hidden, delta, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        out = gate_up.new_empty((len(gate_up), gate_up.shape[1] // 2))
        self._kernels.silu_mul(
            self._threads, KINDS[out.dtype], len(out), out.shape[1], gate_up.data_ptr(), out.data_ptr()
        )
        return out

    def rotate_and_write(
        self, qkv: torch.Tensor, heads: Heads, norms: HeadNorms | None, step: CpuStep, cache: LayerCache
    ) -> None:
        self._kernels.rotate_and_write(
            self._threads,
            KINDS[qkv.dtype],
            len(qkv),
            qkv.data_ptr(),
            qkv.shape[1],
            heads.query,
            heads.kv,
            heads.dim,
            None if norms is None else norms.weight.data_ptr(),
            0.0 if norms is None else norms.eps,
            step.batch.positions.data_ptr(),
            step.cos.data_ptr(),
            step.sin.data_ptr(),
            step.batch.cache_indices.data_ptr(),
            *_addresses(cache),
        )

    def attention(self, qkv: torch.Tensor, heads: Heads, step: CpuStep, cache: LayerCache) -> torch.Tensor:
        out = qkv.new_empty((len(qkv), heads.query * heads.dim))
        self._kernels.paged_attention(
            self._threads,
            KINDS[qkv.dtype],
            qkv.data_ptr(),
            qkv.shape[1],
            heads.query,
            heads.kv,
            heads.dim,
            heads.dim**-0.5,
            heads.soft_cap,
            heads.window or 0,
            *_addresses(cache),
            len(step.contexts),
            step.starts.ctypes.data,
            step.contexts.ctypes.data,
            step.batch.block_tables.data_ptr(),
            step.batch.block_tables.shape[1],
            out.data_ptr(),
        )
        return out

    def _norm(self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty_like(x)
        n = x.shape[-1]
        self._kernels.add_rms_norm(
            self._threads,
            KINDS[x.dtype],
            x.numel() // n,
            n,
            x.data_ptr(),
            _address(delta),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
        )
        return out

    def _pack_integers(self, matrix: QuantizedMatrix) -> IntegerWeight:
        rows, columns = matrix.values.shape
        size = self._kernels.quantized_bytes(rows, columns, matrix.bits, matrix.group)
        panels = torch.empty((-(-rows // PANEL), size // -(-rows // PANEL)), dtype=torch.uint8)
        parts = [None if part is None else part.contiguous() for part in (matrix.values, matrix.scales, matrix.offsets)]
        self._kernels.pack_quantized(rows, columns, matrix.bits, matrix.group, *map(_address, parts), panels.data_ptr())
        return IntegerWeight(panels, rows, columns, matrix.bits, matrix.group)


def _panels(panels: torch.Tensor, rows: slice) -> torch.Tensor:
    assert rows.start % PANEL == 0
    return panels[rows.start // PANEL : -(-rows.stop // PANEL)]


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(cache: LayerCache) -> tuple[int | None, ...]:
    return cache.keys.data_ptr(), cache.values.data_ptr(), _address(cache.key_scales), _address(cache.value_scales)
