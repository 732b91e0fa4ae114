"""The operations on the CPU, computed by the kernels of kernels/csrc. Every method is one call of a kernel.

Tensors are float32 or bfloat16 and contiguous. Kernels run on as many threads as torch has, the calling one among them.
They keep the memory of intermediate values from call to call, so that a step allocates only its results.
"""

from collections.abc import Sequence
from typing import get_args
from weakref import WeakKeyDictionary

import torch

from loraplex_shard.device.parallel import Group
from loraplex_shard.kernels.library import KINDS, Kernels
from loraplex_shard.ops.base import Activation, Compute, HeadNorms, Norm, Outputs, Rotary, Score, Segments
from loraplex_shard.ops.cpu.experts import CpuExpertOperations
from loraplex_shard.ops.cpu.kernel_calls import address_of
from loraplex_shard.ops.cpu.program import Program
from loraplex_shard.ops.cpu.step import SEGMENTS, CpuSegments, CpuStep
from loraplex_shard.ops.cpu.weights import CpuWeight, IntegerWeight, pack
from loraplex_shard.ops.quantized import Quantized
from loraplex_shard.shapes.batch import Batch, Inputs
from loraplex_shard.shapes.cache import KVCache, LayerCache
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import LinearLayout

LARGEST_PROGRAM = 64  # tokens: in larger batches, the time of calling kernels from Python does not matter


class CpuOperations(CpuExpertOperations):
    """Implements loraplex_shard.ops.base.Operations, which has the docstrings. Cache blocks have 16 positions."""

    positions_first = False
    recorded_sizes: tuple[int, ...] = ()

    def __init__(self, kernels: Kernels) -> None:
        super().__init__(kernels)
        self._programs: WeakKeyDictionary[KVCache, dict[tuple[int, bool], Program]] = WeakKeyDictionary()

    def pack(self, matrix: torch.Tensor | Quantized) -> CpuWeight:
        return pack(self._kernels, matrix)

    def prepare(self, batch: Batch) -> CpuStep:
        return CpuStep(batch)

    def forward(self, inputs: Inputs, cache: KVCache, group: Group, compute: Compute, score: Score) -> Outputs:
        step, tokens = self.prepare(inputs.batch()), len(inputs)
        if tokens > LARGEST_PROGRAM or (group.size > 1 and group.shared is None):
            return Outputs(compute(step))
        programs = self._programs.setdefault(cache, {})
        key = tokens, step.segments.int8
        if key not in programs:
            programs[key] = self._record(lambda: compute(step))
        return Outputs(programs[key].run(step.numbers))

    def embedding(self, step: CpuStep, weight: CpuWeight, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        tokens = len(step.batch.token_ids)
        out = self._empty((tokens, weight.columns), dtype)
        self._call(
            "quantized_rows" if isinstance(weight, IntegerWeight) else "weight_rows",
            threads=self._threads,
            kind=KINDS[dtype],
            count=tokens,
            ids=step["tokens"],
            n=weight.rows,
            k=weight.columns,
            packed=weight.panels.data_ptr(),
            scale=scale,
            out=out.data_ptr(),
            **_format(weight),
        )
        self._call(
            "own_embeddings",
            threads=self._threads,
            kind=KINDS[dtype],
            count=tokens,
            ids=step["tokens"],
            k=weight.columns,
            own=step["own_embeddings"],
            out=out.data_ptr(),
        )
        return out

    def linear(self, x: torch.Tensor, weight: CpuWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = self._empty((x.shape[0], weight.rows), x.dtype)
        self.put_linear(out, x, weight, bias)
        return out

    def put_linear(
        self, out: torch.Tensor, x: torch.Tensor, weight: CpuWeight, bias: torch.Tensor | None = None
    ) -> None:
        self._call(
            "quantized_linear" if isinstance(weight, IntegerWeight) else "linear",
            threads=self._threads,
            kind=KINDS[x.dtype],
            m=x.shape[0],
            n=weight.rows,
            k=weight.columns,
            x=x.data_ptr(),
            weight=weight.panels.data_ptr(),
            bias=address_of(bias),
            out=out.data_ptr(),
            **_format(weight),
        )

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

    def norm(self, x: torch.Tensor, norm: Norm, step: CpuStep | None = None) -> torch.Tensor:
        return self._norm(x, None, 1.0, norm, step)

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, scale: float, norm: Norm, step: CpuStep | None = None
    ) -> torch.Tensor:
        return self._norm(hidden, delta, scale, norm, step)

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

    def upcast(
        self, x: torch.Tensor, scale: float = 1.0, soft_cap: float = 0.0, width: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, n = x.shape
        width = max(n, width)
        out, finite = torch.empty((rows, width)), torch.empty(rows, dtype=torch.bool)
        self._kernels.call(
            "upcast",
            threads=self._threads,
            kind=KINDS[x.dtype],
            rows=rows,
            n=n,
            x=x.data_ptr(),
            scale=scale,
            soft_cap=soft_cap,
            width=width,
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
            squares=None if norms is None else address_of(norms.squares),
            eps=0.0 if norms is None else norms.eps,
            own=step["own_norms"],
            index=0 if norms is None else norms.index,
            positions=step["positions"],
            cos=None if rotary is None else rotary.cos.data_ptr(),
            sin=None if rotary is None else rotary.sin.data_ptr(),
            rotary_dim=0 if rotary is None else rotary.cos.shape[1],
            interleaved=rotary is not None and rotary.interleaved,
            query_scale=None if rotary is None else address_of(rotary.query_scale),
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
            sinks=address_of(sinks),
            chunks=step["chunks"],
            starts=step["starts"],
            contexts=step["contexts"],
            rows=step["rows"],
            tables=step["tables"],
            table_width=step["table_width"],
            out=out.data_ptr(),
            **_addresses(cache),
        )
        return out

    def all_reduce_(self, tensor: torch.Tensor, group: Group) -> None:
        if self._recording is None or group.size == 1:
            group.all_reduce_(tensor)
        else:
            assert group.shared is not None
            self._recording.add("all_reduce", group.shared.all_reduce_arguments(tensor), group.shared.check)

    def _norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, scale: float, norm: Norm, step: CpuStep | None
    ) -> torch.Tensor:
        out = self._empty(x.shape, x.dtype)
        self._call(
            "add_norm",
            threads=self._threads,
            kind=KINDS[x.dtype],
            rows=x.shape[0],
            n=x.shape[1],
            hidden=x.data_ptr(),
            delta=address_of(delta),
            scale=scale,
            weight=norm.weight.data_ptr(),
            bias=address_of(norm.bias),
            eps=norm.eps,
            centered=norm.centered,
            own=None if step is None else step["own_norms"],
            index=norm.index,
            out=out.data_ptr(),
        )
        return out


def _format(weight: CpuWeight) -> dict[str, int]:
    """The additional arguments of kernels for quantized weights."""
    return {"bits": weight.bits, "group": weight.group} if isinstance(weight, IntegerWeight) else {}


def _addresses(cache: LayerCache) -> dict[str, int | None]:
    return {
        "keys": cache.keys.data_ptr(),
        "values": cache.values.data_ptr(),
        "key_scales": address_of(cache.key_scales),
        "value_scales": address_of(cache.value_scales),
    }
