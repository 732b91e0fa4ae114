"""The operations on the CPU, computed by the kernels of kernels/csrc. Every method is one call of a kernel.

Tensors are float32 or bfloat16 and contiguous. Kernels run on as many threads as torch has, the calling one among them.
They keep the memory of intermediate values from call to call, so that a step allocates only its results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch

from loraplex_shard.device.parallel import Group
from loraplex_shard.kernels.library import KINDS, Kernels
from loraplex_shard.ops.base import Activation, HeadNorms, Norm, Rotary, Routing, Segments
from loraplex_shard.ops.cpu.program import Program, StepNumber
from loraplex_shard.ops.cpu.weights import PANEL, CpuWeight, ExpertWeights, FloatWeight, IntegerWeight
from loraplex_shard.ops.quantized import QuantizedMatrix
from loraplex_shard.shapes.batch import Batch, Segment
from loraplex_shard.shapes.cache import KVCache, LayerCache
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import LinearLayout

LARGEST_PROGRAM = 64  # tokens: in larger batches, the time of calling kernels from Python does not matter


Ints = np.ndarray[tuple[int], np.dtype[np.int64]]

SEGMENTS = ("segments", "segment_starts", "segment_stops", "segment_adapters", "segment_table_rows")

# The numbers that recorded calls take from a step, in the order of CpuStep.numbers.
STEP = (
    "tokens",
    "positions",
    "indices",
    "chunks",
    "starts",
    "contexts",
    "tables",
    "table_width",
    *SEGMENTS,
)


@dataclass(frozen=True, slots=True)
class CpuSegments:
    """Segments as kernels read them: runs of rows that use the same adapter."""

    starts: Ints
    stops: Ints
    tables: Ints  # addresses of the adapters' tables
    table_rows: Ints  # rows of each table
    int8: bool

    @classmethod
    def of(cls, segments: tuple[Segment, ...]) -> "CpuSegments":
        return cls(
            np.array([segment.start for segment in segments], np.int64),
            np.array([segment.stop for segment in segments], np.int64),
            np.array([segment.adapter.table.data_ptr() for segment in segments], np.int64),
            np.array([len(segment.adapter.table) for segment in segments], np.int64),
            any(segment.adapter.int8 for segment in segments),
        )

    @property
    def numbers(self) -> tuple[int, ...]:
        columns = self.starts, self.stops, self.tables, self.table_rows
        return len(self.starts), *(column.ctypes.data for column in columns)


class CpuStep:
    """A batch as kernels read it. `numbers` has the values of STEP. The step keeps the arrays that they point to."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.starts = np.array(batch.starts, np.int64)
        self.contexts = np.array(batch.context_lengths, np.int64)
        self.segments = CpuSegments.of(batch.segments)
        self.numbers = (
            batch.token_ids.data_ptr(),
            batch.positions.data_ptr(),
            batch.cache_indices.data_ptr(),
            len(self.contexts),
            self.starts.ctypes.data,
            self.contexts.ctypes.data,
            batch.block_tables.data_ptr(),
            batch.block_tables.shape[1],
            *self.segments.numbers,
        )

    def __getitem__(self, name: str) -> StepNumber:
        place = STEP.index(name)
        return StepNumber(self.numbers[place], place)


class CpuOperations:
    """Implements loraplex_shard.ops.base.Operations, which has the docstrings. Cache blocks have 16 positions."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._threads = torch.get_num_threads()
        self._programs: WeakKeyDictionary[KVCache, dict[tuple[int, bool], Program]] = WeakKeyDictionary()
        self._recording: Program | None = None

    def pack(self, matrix: torch.Tensor | QuantizedMatrix) -> CpuWeight:
        if isinstance(matrix, QuantizedMatrix):
            return self._pack_integers(matrix)
        rows, columns = matrix.shape
        matrix = matrix.contiguous()
        panels = matrix.new_empty((-(-rows // PANEL), PANEL * (columns + columns % 2 * (matrix.itemsize == 2))))
        self._kernels.call(
            "pack_weight",
            kind=KINDS[matrix.dtype],
            n=rows,
            k=columns,
            weight=matrix.data_ptr(),
            packed=panels.data_ptr(),
        )
        return FloatWeight(panels, rows, columns)

    def prepare(self, batch: Batch) -> CpuStep:
        return CpuStep(batch)

    def forward(self, step: CpuStep, cache: KVCache, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        tokens = len(step.batch.token_ids)
        if tokens > LARGEST_PROGRAM:
            return compute()
        programs = self._programs.setdefault(cache, {})
        key = tokens, step.segments.int8
        if key not in programs:
            programs[key] = self._record(compute)
        return programs[key].run(step.numbers)

    def embedding(self, step: CpuStep, weight: CpuWeight, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        tokens = len(step.batch.token_ids)
        out = self._empty((tokens, weight.columns), dtype)
        self._call(
            "quantized_rows" if isinstance(weight, IntegerWeight) else "weight_rows",
            threads=self._threads,
            kind=KINDS[dtype],
            count=tokens,
            ids=step["tokens"],
            k=weight.columns,
            packed=weight.panels.data_ptr(),
            scale=scale,
            out=out.data_ptr(),
            **_format(weight),
        )
        return out

    def linear(self, x: torch.Tensor, weight: CpuWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.shape[0]
        out = self._empty((rows, weight.rows), x.dtype)
        self._call(
            "quantized_linear" if isinstance(weight, IntegerWeight) else "linear",
            threads=self._threads,
            kind=KINDS[x.dtype],
            m=rows,
            n=weight.rows,
            k=weight.columns,
            x=x.data_ptr(),
            weight=weight.panels.data_ptr(),
            bias=_address(bias),
            out=out.data_ptr(),
            **_format(weight),
        )
        return out

    def add_lora_delta(
        self, out: torch.Tensor, x: torch.Tensor, segments: CpuStep | Segments, layout: LinearLayout
    ) -> None:
        if isinstance(segments, CpuStep):
            numbers: Sequence[int] = [segments[name] for name in SEGMENTS]
            chosen = segments.segments
        else:
            chosen = CpuSegments.of(segments)
            numbers = chosen.numbers
        if len(chosen.starts) or self._recording is not None:
            count, starts, stops, tables, _ = numbers
            self._call(
                "add_lora_delta",
                threads=self._threads,
                kind=KINDS[x.dtype],
                int8_weights=chosen.int8,
                segments=count,
                starts=starts,
                stops=stops,
                tables=tables,
                layer=layout.index,
                x=x.data_ptr(),
                k=x.shape[1],
                out=out.data_ptr(),
                n=out.shape[1],
            )

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return self._norm(x, None, 1.0, norm)

    def add_norm(self, hidden: torch.Tensor, delta: torch.Tensor, scale: float, norm: Norm) -> torch.Tensor:
        return self._norm(hidden, delta, scale, norm)

    def add_(self, hidden: torch.Tensor, delta: torch.Tensor, scale: float) -> None:
        self._call(
            "add",
            threads=self._threads,
            kind=KINDS[hidden.dtype],
            rows=hidden.shape[0],
            n=hidden.shape[1],
            hidden=hidden.data_ptr(),
            delta=delta.data_ptr(),
            scale=scale,
        )

    def activate(self, x: torch.Tensor, function: Activation, gated: bool) -> torch.Tensor:
        rows, n = x.shape[0], x.shape[1] // (2 if gated else 1)
        out = self._empty((rows, n), x.dtype)
        self._call(
            "activate",
            threads=self._threads,
            kind=KINDS[x.dtype],
            function=get_args(Activation).index(function),
            gated=gated,
            rows=rows,
            n=n,
            x=x.data_ptr(),
            out=out.data_ptr(),
        )
        return out

    def upcast(self, x: torch.Tensor, scale: float = 1.0, soft_cap: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        rows, n = x.shape
        out, finite = torch.empty((rows, n)), torch.empty(rows, dtype=torch.bool)
        self._kernels.call(
            "upcast",
            threads=self._threads,
            kind=KINDS[x.dtype],
            rows=rows,
            n=n,
            x=x.data_ptr(),
            scale=scale,
            soft_cap=soft_cap,
            out=out.data_ptr(),
            finite=finite.data_ptr(),
        )
        return out, finite

    def head_squares(self, qkv: torch.Tensor, heads: Heads, query: float, key: float) -> torch.Tensor:
        out = self._empty((qkv.shape[0], 2), torch.float32)
        self._call(
            "head_squares",
            threads=self._threads,
            kind=KINDS[qkv.dtype],
            tokens=qkv.shape[0],
            qkv=qkv.data_ptr(),
            stride=qkv.shape[1],
            queries=heads.query * heads.dim,
            keys=heads.kv * heads.dim,
            query_scale=query,
            key_scale=key,
            out=out.data_ptr(),
        )
        return out

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        heads: Heads,
        norms: HeadNorms | None,
        rotary: Rotary | None,
        step: CpuStep,
        cache: LayerCache,
    ) -> None:
        self._call(
            "rotate_and_write",
            threads=self._threads,
            kind=KINDS[qkv.dtype],
            tokens=qkv.shape[0],
            qkv=qkv.data_ptr(),
            heads=heads.query,
            kv_heads=heads.kv,
            head_dim=heads.dim,
            value_dim=heads.value_dim,
            norm=None if norms is None else norms.weight.data_ptr(),
            squares=None if norms is None else _address(norms.squares),
            eps=0.0 if norms is None else norms.eps,
            positions=step["positions"],
            cos=None if rotary is None else rotary.cos.data_ptr(),
            sin=None if rotary is None else rotary.sin.data_ptr(),
            rotary_dim=0 if rotary is None else rotary.cos.shape[1],
            interleaved=rotary is not None and rotary.interleaved,
            query_scale=None if rotary is None else _address(rotary.query_scale),
            indices=step["indices"],
            **_addresses(cache),
        )

    def attention(
        self, qkv: torch.Tensor, heads: Heads, step: CpuStep, cache: LayerCache, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = self._empty((qkv.shape[0], heads.out_width), qkv.dtype)
        self._call(
            "paged_attention",
            threads=self._threads,
            kind=KINDS[qkv.dtype],
            query=qkv.data_ptr(),
            query_stride=qkv.shape[1],
            heads=heads.query,
            kv_heads=heads.kv,
            head_dim=heads.dim,
            value_dim=heads.value_dim,
            scale=heads.scale,
            soft_cap=heads.soft_cap,
            window=heads.window or 0,
            sinks=_address(sinks),
            chunks=step["chunks"],
            starts=step["starts"],
            contexts=step["contexts"],
            tables=step["tables"],
            table_width=step["table_width"],
            out=out.data_ptr(),
            **_addresses(cache),
        )
        return out

    def route(self, logits: torch.Tensor, chosen: int, normalized: bool) -> Routing:
        tokens, experts = logits.shape
        weights = self._empty((tokens * chosen,), torch.float32)
        order, places = (self._empty((tokens * chosen,), torch.int64) for _ in range(2))
        starts = self._empty((experts + 1,), torch.int64)
        self._call(
            "route",
            kind=KINDS[logits.dtype],
            tokens=tokens,
            experts=experts,
            chosen=chosen,
            normalized=normalized,
            logits=logits.data_ptr(),
            weights=weights.data_ptr(),
            order=order.data_ptr(),
            places=places.data_ptr(),
            starts=starts.data_ptr(),
        )
        return Routing(weights, order, places, starts, chosen)

    def dispatch(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        pairs, n = len(routing.order), x.shape[1]
        out = self._empty((pairs, n), x.dtype)
        self._call(
            "dispatch",
            threads=self._threads,
            kind=KINDS[x.dtype],
            pairs=pairs,
            chosen=routing.chosen,
            places=routing.places.data_ptr(),
            n=n,
            x=x.data_ptr(),
            out=out.data_ptr(),
        )
        return out

    def stack(self, weights: Sequence[CpuWeight], biases: Sequence[torch.Tensor | None]) -> ExpertWeights:
        return ExpertWeights(weights, biases)

    def expert_linear(self, x: torch.Tensor, routing: Routing, weight: ExpertWeights) -> torch.Tensor:
        n = weight.weights[0].rows
        out = self._empty((x.shape[0], n), x.dtype)
        self._call(
            "expert_linear",
            threads=self._threads,
            kind=KINDS[x.dtype],
            count=len(weight.weights),
            starts=routing.starts.data_ptr(),
            n=n,
            k=x.shape[1],
            x=x.data_ptr(),
            experts=weight.table.data_ptr(),
            out=out.data_ptr(),
        )
        return out

    def add_expert_lora_delta(
        self, out: torch.Tensor, x: torch.Tensor, step: CpuStep, routing: Routing, layouts: Sequence[LinearLayout]
    ) -> None:
        if not len(step.segments.starts) and self._recording is None:
            return
        count, starts, stops, tables, table_rows = (step[name] for name in SEGMENTS)
        self._call(
            "add_expert_lora_delta",
            threads=self._threads,
            kind=KINDS[x.dtype],
            int8_weights=step.segments.int8,
            segments=count,
            starts=starts,
            stops=stops,
            tables=tables,
            table_rows=table_rows,
            layer=layouts[0].index,
            count=len(layouts),
            expert_starts=routing.starts.data_ptr(),
            order=routing.order.data_ptr(),
            chosen=routing.chosen,
            x=x.data_ptr(),
            k=x.shape[1],
            out=out.data_ptr(),
            n=out.shape[1],
        )

    def combine(
        self, x: torch.Tensor, routing: Routing, shared: torch.Tensor | None = None, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        tokens, n = x.shape[0] // routing.chosen, x.shape[1]
        out = self._empty((tokens, n), x.dtype)
        self._call(
            "combine",
            threads=self._threads,
            kind=KINDS[x.dtype],
            tokens=tokens,
            chosen=routing.chosen,
            weights=routing.weights.data_ptr(),
            places=routing.places.data_ptr(),
            n=n,
            x=x.data_ptr(),
            shared=_address(shared),
            gate=_address(gate),
            out=out.data_ptr(),
        )
        return out

    def all_reduce_(self, tensor: torch.Tensor, group: Group) -> None:
        if self._recording is None or group.size == 1:
            group.all_reduce_(tensor)
        else:
            assert group.shared is not None
            self._recording.add("all_reduce", group.shared.all_reduce_arguments(tensor), group.shared.check)

    def _norm(self, x: torch.Tensor, delta: torch.Tensor | None, scale: float, norm: Norm) -> torch.Tensor:
        out = self._empty(x.shape, x.dtype)
        self._call(
            "add_norm",
            threads=self._threads,
            kind=KINDS[x.dtype],
            rows=x.shape[0],
            n=x.shape[1],
            hidden=x.data_ptr(),
            delta=_address(delta),
            scale=scale,
            weight=norm.weight.data_ptr(),
            bias=_address(norm.bias),
            eps=norm.eps,
            centered=norm.centered,
            out=out.data_ptr(),
        )
        return out

    def _record(self, compute: Callable[[], torch.Tensor]) -> Program:
        program = self._recording = Program(self._kernels)
        try:
            program.finish(compute())
        finally:
            self._recording = None
        return program

    def _call(self, kernel: str, **arguments: int | float | None) -> None:
        if self._recording is None:
            self._kernels.call(kernel, **arguments)
        else:
            self._recording.add(kernel, arguments)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if self._recording is None:
            return torch.empty(shape, dtype=dtype)
        return self._recording.empty(shape, dtype)

    def _pack_integers(self, matrix: QuantizedMatrix) -> IntegerWeight:
        rows, columns = matrix.values.shape
        form = {"bits": matrix.bits, "group": matrix.group}
        size = self._kernels.call("quantized_bytes", n=rows, k=columns, **form)
        panels = torch.empty((-(-rows // PANEL), size // -(-rows // PANEL)), dtype=torch.uint8)
        offsets = None if matrix.offsets is None else matrix.offsets.contiguous()
        values, scales = matrix.values.contiguous(), matrix.scales.contiguous()
        self._kernels.call(
            "pack_quantized",
            n=rows,
            k=columns,
            values=values.data_ptr(),
            scales=scales.data_ptr(),
            offsets=_address(offsets),
            packed=panels.data_ptr(),
            **form,
        )
        return IntegerWeight(panels, rows, columns, matrix.bits, matrix.group)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _format(weight: CpuWeight) -> dict[str, int]:
    """The additional arguments of kernels for quantized weights."""
    return {"bits": weight.bits, "group": weight.group} if isinstance(weight, IntegerWeight) else {}


def _addresses(cache: LayerCache) -> dict[str, int | None]:
    return {
        "keys": cache.keys.data_ptr(),
        "values": cache.values.data_ptr(),
        "key_scales": _address(cache.key_scales),
        "value_scales": _address(cache.value_scales),
    }
