"""The operations on a CUDA device: torch's own where it has them, else the Triton kernels of this folder.

Tensors are float32, bfloat16 or float16 and contiguous. They must be on the calling thread's current device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from loraplex_shard.device.parallel import Group
from loraplex_shard.ops.base import Activation, Compute, HeadNorms, Norm, Outputs, Rotary, Routing, Score, Segments
from loraplex_shard.ops.cuda import elementwise, int4, quantized
from loraplex_shard.ops.cuda.attention import attention
from loraplex_shard.ops.cuda.experts import FloatExperts
from loraplex_shard.ops.cuda.float8 import Float8Weight, linear_float8
from loraplex_shard.ops.cuda.forms import BUCKETS, Form
from loraplex_shard.ops.cuda.graphs import Record, Recordings
from loraplex_shard.ops.cuda.int4 import Int4Weight, linear_int4
from loraplex_shard.ops.cuda.lora import LoraTiles, add_lora_delta
from loraplex_shard.ops.cuda.quantized import IntegerWeight
from loraplex_shard.ops.cuda.rotary import rotate_and_write
from loraplex_shard.ops.cuda.runs import Runs
from loraplex_shard.ops.cuda.step import CudaStep, Kind
from loraplex_shard.ops.cuda.tiles import cut_batch, make_tiles
from loraplex_shard.ops.experts import ExpertOperations
from loraplex_shard.ops.own_weights import norm_runs, part_of, put_own_embeddings, put_own_norms
from loraplex_shard.ops.quantized import Quantized, QuantizedMatrix
from loraplex_shard.shapes.batch import Batch, Inputs
from loraplex_shard.shapes.cache import KVCache, LayerCache
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import LinearLayout


@dataclass(frozen=True, slots=True)
class FloatWeight:
    matrix: torch.Tensor  # [rows, columns]

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.matrix)

    def part(self, rows: slice) -> "FloatWeight":
        return FloatWeight(self.matrix[rows])

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return F.embedding(indices, self.matrix)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "FloatWeight":
        return FloatWeight(function(self.matrix))


CudaWeight = FloatWeight | IntegerWeight | Int4Weight | Float8Weight


def _norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    return elementwise.add_norm(x, None, 1.0, norm)


class CudaOperations(ExpertOperations):
    """Implements loraplex_shard.ops.base.Operations, which has the docstrings."""

    positions_first = True
    recorded_sizes: tuple[int, ...] = BUCKETS

    def __init__(self, device: torch.device, record: Record | None = None) -> None:
        """`record`: GraphRecorder() on a GPU."""
        self._device = device
        self._recordings = Recordings(record)
        self._runs = Runs.of(())  # of the last step
        self._kinds: tuple[Kind, ...] = ()  # of the model's attention, once it has run
        self._has_experts = self._experts_wait = False  # the model
        # cuBLAS may otherwise sum in bfloat16; Operations.linear sums in float32.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def pack(self, matrix: torch.Tensor | Quantized) -> CudaWeight:
        match matrix:
            case torch.Tensor():
                return FloatWeight(matrix)
            case QuantizedMatrix() if int4.fits(matrix, self._device):
                return int4.pack(matrix, self._device)
            case QuantizedMatrix():
                return quantized.pack(matrix, self._device)
            case _:
                return Float8Weight(matrix.values.to(self._device), matrix.scales.to(self._device))

    def prepare(self, batch: Batch) -> CudaStep:
        return CudaStep.of(batch, Runs.of(batch.segments), {}, self._device)

    def forward(self, inputs: Inputs, cache: KVCache, group: Group, compute: Compute, score: Score) -> Outputs:
        runs = self._runs = self._runs.after(inputs.segments)
        cuts = {kind: cut_batch(inputs, *kind) for kind in self._kinds}
        if cuts and group.recordable_on_gpu and self.is_recordable(runs):
            form = Form.of(inputs, runs, cuts)
            if form is not None:
                return self._recordings.run(form, inputs, runs, cuts, cache, group, compute, score)
        step = CudaStep.of(inputs.batch(), runs, cuts, self._device)
        hidden = compute(step)
        self._kinds = tuple(step.tiles)
        return Outputs(hidden)

    def is_recordable(self, runs: Runs) -> bool:
        """Whether all that a batch with these adapters needs can be recorded. What runs for one adapter after the
        other, or waits for the device, cannot."""
        return (
            self._recordings.possible
            and not (self._has_experts and runs.key)
            and not self._experts_wait
            and not runs.one_by_one
        )

    def embedding(self, step: CudaStep, weight: CudaWeight, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        assert not isinstance(weight, Float8Weight), "embeddings are not rounded to float8"
        ids = step.batch.token_ids
        own = any(segment.adapter.own.embedding for segment in step.batch.segments)
        if own:
            ids = ids.clamp(max=len(weight) - 1)
        out = weight.rows(ids).to(dtype) * scale
        if own:
            put_own_embeddings(out, step.batch)
        return out

    def linear(self, x: torch.Tensor, weight: CudaWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(weight, IntegerWeight):
            return quantized.linear(x, weight, bias)
        if isinstance(weight, Int4Weight):
            return linear_int4(x, weight, bias)
        if isinstance(weight, Float8Weight):
            return linear_float8(x, weight, bias)
        return F.linear(x, weight.matrix, bias)

    def put_linear(
        self, out: torch.Tensor, x: torch.Tensor, weight: CudaWeight, bias: torch.Tensor | None = None
    ) -> None:
        out.copy_(self.linear(x, weight, bias))

    def add_lora_delta(
        self, out: torch.Tensor, x: torch.Tensor, segments: CudaStep | Segments, layout: LinearLayout
    ) -> None:
        if isinstance(segments, CudaStep):
            if segments.touches(layout.name):
                add_lora_delta(out, x, segments.lora, layout)
        elif any(layout.name in run.adapter.layers for run in segments):
            add_lora_delta(out, x, LoraTiles.of(segments, self._device), layout)

    def stack(self, weights: Sequence[CudaWeight], biases: Sequence[torch.Tensor | None]) -> Any:
        floats = [weight.matrix for weight in weights if isinstance(weight, FloatWeight)]
        self._has_experts = True
        if len(floats) == len(weights):
            return FloatExperts(floats, biases)
        self._experts_wait = True  # the host learns what the tokens chose
        return super().stack(weights, biases)

    def expert_linear(self, x: torch.Tensor, routing: Routing, weight: Any) -> torch.Tensor:
        return (
            weight.linear(x, routing) if isinstance(weight, FloatExperts) else super().expert_linear(x, routing, weight)
        )

    def all_reduce_(self, tensor: torch.Tensor, group: Group) -> None:
        group.all_reduce_(tensor)

    def norm(self, x: torch.Tensor, norm: Norm, step: CudaStep | None = None) -> torch.Tensor:
        return put_own_norms(_norm, _norm(x, norm), x, norm, step.batch.segments if step else ())

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, scale: float, norm: Norm, step: CudaStep | None = None
    ) -> torch.Tensor:
        segments = step.batch.segments if step else ()
        out = elementwise.add_norm(hidden, delta, scale, norm)
        return put_own_norms(_norm, out, hidden, norm, segments)

    def add_(self, hidden: torch.Tensor, delta: torch.Tensor, scale: float) -> None:
        hidden.add_(delta, alpha=scale)

    def activate(self, x: torch.Tensor, function: Activation, gated: bool) -> torch.Tensor:
        return elementwise.activate(x, function, gated)

    def upcast(
        self, x: torch.Tensor, scale: float = 1.0, soft_cap: float = 0.0, width: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, finite = elementwise.upcast(x, scale, soft_cap)
        return F.pad(logits, (0, max(width - x.shape[1], 0)), value=-torch.inf), finite

    def head_squares(self, qkv: torch.Tensor, heads: Heads, query: float, key: float) -> torch.Tensor:
        queries = heads.query * heads.dim
        parts = (qkv[:, :queries], query), (qkv[:, queries : queries + heads.kv * heads.dim], key)
        return torch.stack([part.float().square().sum(1) * scale for part, scale in parts], dim=1)

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        heads: Heads,
        norms: HeadNorms | None,
        rotary: Rotary | None,
        step: CudaStep,
        cache: LayerCache,
    ) -> None:
        if norms is None:
            return rotate_and_write(qkv, heads, None, rotary, step.batch, cache)
        for run, own in norm_runs(norms, step.batch.segments, len(qkv)):
            rotate_and_write(qkv[run], heads, own, rotary, part_of(step.batch, run), cache)

    def attention(
        self, qkv: torch.Tensor, heads: Heads, step: CudaStep, cache: LayerCache, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        kind = heads, qkv.dtype
        if kind not in step.tiles:
            step.tiles[kind] = make_tiles(step.batch, *kind, self._device)
        return attention(qkv, heads, step.batch, step.tiles[kind], cache, sinks)
