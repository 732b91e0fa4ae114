"""Each operation in plain torch, on any device. It defines what the fast implementations compute, so it is written to
be read."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from loraplex_shard.device.parallel import Group
from loraplex_shard.ops.base import Activation, Compute, HeadNorms, Norm, Outputs, Rotary, Score, Segments
from loraplex_shard.ops.experts import ExpertOperations
from loraplex_shard.ops.own_weights import norm_runs, put_own_embeddings, put_own_norms
from loraplex_shard.ops.quantized import Quantized, QuantizedMatrix, rounded_to_float8, rounded_to_int8, scaled_to
from loraplex_shard.shapes.batch import Batch, Inputs
from loraplex_shard.shapes.cache import SCALED, KVCache, LayerCache
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import LinearLayout

LIMIT = 7.0  # GPT-OSS clamps its gates and ups to this, and then adds 1 to the ups
FUNCTIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "clamped_swiglu": lambda x: FUNCTIONS["quick_gelu"](x.clamp(max=LIMIT)),
}


@dataclass(frozen=True, slots=True)
class ReferenceWeight:
    matrix: torch.Tensor
    group: int | None = None  # for a matrix of integers: activations are rounded to int8 in groups of this size
    float8: bool = False  # activations are rounded to float8

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def part(self, rows: slice) -> "ReferenceWeight":
        return replace(self, matrix=self.matrix[rows])

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "ReferenceWeight":
        return replace(self, matrix=function(self.matrix))


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    batch: Batch


class ReferenceOperations(ExpertOperations):
    """Implements loraplex_shard.ops.base.Operations, which has the docstrings."""

    positions_first = False  # either form would do
    recorded_sizes: tuple[int, ...] = ()

    def pack(self, matrix: torch.Tensor | Quantized) -> ReferenceWeight:
        if isinstance(matrix, torch.Tensor):
            return ReferenceWeight(matrix)
        if isinstance(matrix, QuantizedMatrix):
            return ReferenceWeight(matrix.dequantized(), matrix.group)
        return ReferenceWeight(matrix.dequantized(), float8=True)

    def prepare(self, batch: Batch) -> ReferenceStep:
        return ReferenceStep(batch)

    def forward(self, inputs: Inputs, cache: KVCache, group: Group, compute: Compute, score: Score) -> Outputs:
        return Outputs(compute(self.prepare(inputs.batch())))

    def embedding(
        self, step: ReferenceStep, weight: ReferenceWeight, dtype: torch.dtype, scale: float = 1.0
    ) -> torch.Tensor:
        known = step.batch.token_ids.clamp(max=len(weight.matrix) - 1)
        out = F.embedding(known, weight.matrix).to(dtype) * scale
        put_own_embeddings(out, step.batch)
        return out

    def linear(self, x: torch.Tensor, weight: ReferenceWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.group is None and not weight.float8:
            return F.linear(x, weight.matrix, bias)
        rounded = rounded_to_float8(x) if weight.group is None else rounded_to_int8(x, weight.group)
        out = F.linear(rounded, weight.matrix).to(x.dtype)
        return out if bias is None else out.add_(bias)

    def put_linear(
        self, out: torch.Tensor, x: torch.Tensor, weight: ReferenceWeight, bias: torch.Tensor | None = None
    ) -> None:
        out.copy_(self.linear(x, weight, bias))

    def add_lora_delta(
        self, out: torch.Tensor, x: torch.Tensor, segments: ReferenceStep | Segments, layout: LinearLayout
    ) -> None:
        for segment in segments.batch.segments if isinstance(segments, ReferenceStep) else segments:
            layer = segment.adapter.layers.get(layout.name)
            if layer is None:
                continue
            shrink = layer.shrink.to(x.dtype)
            shrunk = x[segment.start : segment.stop] @ shrink.T  # [tokens of the segment, stacked lora_ranks]
            if layer.scales is not None:
                shrunk = shrunk * layer.scales.to(x.dtype)
            expanded = out[segment.start : segment.stop]
            for e in layer.expansions:
                own = expanded[:, e.start : e.stop]
                if e.affine is not None:
                    factors, shifts = e.affine
                    own.copy_(own.float() * factors + shifts)
                own.addmm_(shrunk[:, e.rank_start : e.rank_stop], e.weight.to(x.dtype))

    def all_reduce_(self, tensor: torch.Tensor, group: Group) -> None:
        group.all_reduce_(tensor)

    def norm(self, x: torch.Tensor, norm: Norm, step: ReferenceStep | None = None) -> torch.Tensor:
        return put_own_norms(_norm, _norm(x, norm), x, norm, step.batch.segments if step else ())

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, scale: float, norm: Norm, step: ReferenceStep | None = None
    ) -> torch.Tensor:
        return self.norm(hidden.add_(delta, alpha=scale), norm, step)

    def add_(self, hidden: torch.Tensor, delta: torch.Tensor, scale: float) -> None:
        hidden.add_(delta, alpha=scale)

    def activate(self, x: torch.Tensor, function: Activation, gated: bool) -> torch.Tensor:
        if not gated:
            return FUNCTIONS[function](x)
        gate, up = x.chunk(2, dim=-1)
        if function == "clamped_swiglu":
            up = up.clamp(-LIMIT, LIMIT) + 1
        return FUNCTIONS[function](gate).mul_(up)

    def upcast(
        self, x: torch.Tensor, scale: float = 1.0, soft_cap: float = 0.0, width: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.float() * scale
        finite = wide.sum(-1).isfinite()  # in float32: the sum of large float16 logits would overflow
        logits = soft_cap * (wide / soft_cap).tanh() if soft_cap else wide
        return F.pad(logits, (0, max(width - x.shape[1], 0)), value=-torch.inf), finite

    def head_squares(self, qkv: torch.Tensor, heads: Heads, query: float, key: float) -> torch.Tensor:
        keys = heads.query * heads.dim
        parts = (qkv[:, :keys], query), (qkv[:, keys : keys + heads.kv * heads.dim], key)
        return torch.stack([part.float().square().sum(1) * scale for part, scale in parts], dim=1)

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        heads: Heads,
        norms: HeadNorms | None,
        rotary: Rotary | None,
        step: ReferenceStep,
        cache: LayerCache,
    ) -> None:
        values_start = qkv.shape[1] - heads.kv * heads.value_dim
        query_key = qkv[:, :values_start].view(len(qkv), -1, heads.dim)
        value = qkv[:, values_start:].view(len(qkv), -1, heads.value_dim)
        if norms is not None:
            if norms.squares is None:
                squares = query_key.float().square().mean(-1)
            else:
                squares = norms.squares.repeat_interleave(torch.tensor((heads.query, heads.kv)), dim=1)
            normed = query_key.float() * (squares[..., None] + norms.eps).rsqrt()
            for run, own in norm_runs(norms, step.batch.segments, len(qkv)):
                query_key[run] = (normed[run] * own.weight).to(qkv.dtype)
        if rotary is not None:
            rotated = query_key[:, :, : rotary.cos.shape[1]]
            cos, sin = (angles[step.batch.positions, None] for angles in (rotary.cos, rotary.sin))
            rotated.copy_(rotated * cos + _partners(rotated, rotary.interleaved) * sin)
            if rotary.query_scale is not None:
                query_key[:, : heads.query].mul_(rotary.query_scale[step.batch.positions, None, None])
        block_size = cache.keys.shape[-1]
        blocks = step.batch.cache_indices // block_size
        offsets = step.batch.cache_indices % block_size
        keys, key_scales = _as_stored(query_key[:, heads.query :], cache)
        values, value_scales = _as_stored(value, cache)
        cache.keys[blocks, :, :, offsets] = keys
        cache.values[blocks, :, offsets] = values
        if cache.key_scales is not None and cache.value_scales is not None:
            cache.key_scales[blocks, :, offsets] = key_scales
            cache.value_scales[blocks, :, offsets] = value_scales

    def attention(
        self,
        qkv: torch.Tensor,
        heads: Heads,
        step: ReferenceStep,
        cache: LayerCache,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query = qkv[:, : heads.query * heads.dim].reshape(len(qkv), heads.kv, -1, heads.dim)
        out = query.new_empty((*query.shape[:3], heads.value_dim))
        for chunk, (start, stop) in enumerate(pairwise(step.batch.starts.tolist())):
            out[start:stop] = _attend(query[start:stop], heads, step.batch, chunk, cache, sinks)
        return out.view(len(qkv), -1)


def _norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    wide = x.float()
    if norm.centered:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * (wide.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
    return (normed if norm.bias is None else normed + norm.bias).to(x.dtype)


def _partners(heads: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Exchanges the two numbers of each pair."""
    shape = (*heads.shape[:-1], -1, 2) if interleaved else (*heads.shape[:-1], 2, -1)
    return heads.view(shape).flip(-1 if interleaved else -2).flatten(-2)


def _attend(
    query: torch.Tensor, heads: Heads, batch: Batch, chunk: int, cache: LayerCache, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention of one chunk's queries [tokens, kv_heads, group, dim] over its sequence's context:
    [tokens, kv_heads, group, value_dim]."""
    context, block_size = int(batch.context_lengths[chunk]), cache.keys.shape[-1]
    positions = torch.arange(context - len(query), context, device=query.device)[:, None]
    first = max(0, context - len(query) - heads.window + 1) // block_size if heads.window else 0
    blocks = batch.block_tables[batch.rows[chunk], first : -(-context // block_size)]
    seen = torch.arange(first * block_size, context, device=query.device)
    keys = _as_read(cache.keys.transpose(2, 3), cache.key_scales, blocks, query.dtype)[:, : len(seen)]
    values = _as_read(cache.values, cache.value_scales, blocks, query.dtype)[:, : len(seen)]
    scores = torch.einsum("tkgd,kpd->kgtp", query, keys).float() * heads.scale
    if heads.soft_cap:
        scores = heads.soft_cap * (scores / heads.soft_cap).tanh()
    hidden = seen > positions
    if heads.window:
        hidden |= seen <= positions - heads.window
    scores.masked_fill_(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.view(heads.kv, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(-1)[..., : len(seen)].to(query.dtype)
    return torch.einsum("kgtp,kpd->tkgd", weights, values)


def _as_stored(heads: torch.Tensor, cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys or values [tokens, kv_heads, dim] in the cache's dtype, and their scales [tokens, kv_heads]."""
    if cache.key_scales is None:
        return heads, heads.new_ones(heads.shape[:2])
    dtype, peaks = cache.keys.dtype, heads.float().abs().amax(-1)
    values = heads.float() * scaled_to(SCALED[dtype], peaks)[:, :, None]
    return (values.round_() if dtype == torch.int8 else values).to(dtype), peaks / SCALED[dtype]


def _as_read(
    stored: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the positions of these blocks one after the other: [kv_heads, positions, dim]."""
    read = stored[blocks].transpose(0, 1).flatten(1, 2)
    if scales is None:
        return read
    return (read.float() * scales[blocks].transpose(0, 1).flatten(1, 2)[:, :, None]).to(dtype)
