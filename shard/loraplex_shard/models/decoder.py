"""The decoder: embedding, layers of attention and MLP, final norm, lm head. What differs by model is in its spec.

It says what is computed. How a layer is cut over ranks and what adapters add is the layers' business; how it is
computed on this device, the operations'.
"""

from dataclasses import dataclass

import torch
from torch import nn

from loraplex_shard.batch import Batch, Segment
from loraplex_shard.cache import KVCache
from loraplex_shard.layers.embedding import Embedding
from loraplex_shard.layers.layout import LinearLayout
from loraplex_shard.layers.linear import ColumnLinear, RowLinear
from loraplex_shard.layers.norm import HeadNorm, RmsNorm
from loraplex_shard.models.cut import DecoderCut
from loraplex_shard.models.spec import DecoderSpec
from loraplex_shard.ops.paged_attention import AttentionReads, paged_attention, prepare_reads
from loraplex_shard.ops.rotary import rotate_
from loraplex_shard.ops.silu_mul import silu_mul
from loraplex_shard.ops.write_kv import write_kv
from loraplex_shard.parallel import Group


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What all layers need of one step's batch, made once."""

    segments: tuple[Segment, ...]
    cos: torch.Tensor  # [tokens, 1, head_dim]
    sin: torch.Tensor
    cache_indices: torch.Tensor  # [tokens]
    reads: dict[int | None, AttentionReads]  # by window


class Attention(nn.Module):
    def __init__(self, index: int, spec: DecoderSpec, cut: DecoderCut, group: Group) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cut.heads, cut.kv_heads, spec.head_dim
        self.window = spec.windows[index]
        self.qkv = ColumnLinear(cut.qkv(index), spec.qkv_bias)
        self.o = RowLinear(cut.o(index), spec.o_bias, group)
        self.qk_norm = None
        if spec.qk_norm:
            prefix = f"model.layers.{index}.self_attn"
            names = f"{prefix}.q_norm.weight", f"{prefix}.k_norm.weight"
            self.qk_norm = HeadNorm(*names, self.heads, self.kv_heads, self.head_dim, spec.norm_eps)

    def forward(self, hidden: torch.Tensor, step: StepInputs, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(hidden, step.segments).view(len(hidden), -1, self.head_dim)  # [tokens, heads, head_dim]
        query_key, value = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if self.qk_norm is not None:
            query_key = self.qk_norm(query_key)
        rotate_(query_key, step.cos, step.sin)
        query, key = query_key.split((self.heads, self.kv_heads), dim=1)
        write_kv(key, value, keys, values, step.cache_indices)
        attended = paged_attention(query, keys, values, step.reads[self.window])
        out: torch.Tensor = self.o(attended.flatten(1), step.segments)
        return out


class Mlp(nn.Module):
    def __init__(self, index: int, spec: DecoderSpec, cut: DecoderCut, group: Group) -> None:
        super().__init__()
        self.gate_up = ColumnLinear(cut.gate_up(index), spec.mlp_bias)
        self.down = RowLinear(cut.down(index), spec.mlp_bias, group)

    def forward(self, hidden: torch.Tensor, step: StepInputs) -> torch.Tensor:
        out: torch.Tensor = self.down(silu_mul(self.gate_up(hidden, step.segments)), step.segments)
        return out


class DecoderLayer(nn.Module):
    def __init__(self, index: int, spec: DecoderSpec, cut: DecoderCut, group: Group) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"
        self.attention_norm = RmsNorm(f"{prefix}.input_layernorm.weight", spec.hidden_size, spec.norm_eps)
        self.attention = Attention(index, spec, cut, group)
        self.mlp_norm = RmsNorm(f"{prefix}.post_attention_layernorm.weight", spec.hidden_size, spec.norm_eps)
        self.mlp = Mlp(index, spec, cut, group)

    def forward(self, hidden: torch.Tensor, step: StepInputs, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        hidden = hidden.add_(self.attention(self.attention_norm(hidden), step, keys, values))
        return hidden.add_(self.mlp(self.mlp_norm(hidden), step))


class Decoder(nn.Module):
    """One rank's part of the model. `load_decoder` makes it; its parameters are on the meta device until then."""

    def __init__(
        self, spec: DecoderSpec, group: Group, rope: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        cut = DecoderCut(spec, group.rank, group.size)
        self.vocab_size = spec.vocab_size
        self.spec, self.group, self.cut, self.dtype = spec, group, cut, dtype
        self.embedding = Embedding("model.embed_tokens.weight", spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(index, spec, cut, group) for index in range(spec.layers))
        self.norm = RmsNorm("model.norm.weight", spec.hidden_size, spec.norm_eps)
        self.lm_head = ColumnLinear(cut.lm_head(), bias=False)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", rope[0], persistent=False)
        self.register_buffer("sin", rope[1], persistent=False)

    @property
    def layouts(self) -> tuple[LinearLayout, ...]:
        """All linear layers of this rank, the lm head included."""
        return tuple(module.layout for module in self.modules() if isinstance(module, ColumnLinear | RowLinear))

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Computes the batch's tokens and writes their keys and values: [tokens, hidden], after the final norm."""
        step = self._prepare(batch, cache)
        hidden = self.embedding(batch.token_ids)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            hidden = layer(hidden, step, keys, values)
        normed: torch.Tensor = self.norm(hidden)
        return normed

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, segments: tuple[Segment, ...]) -> torch.Tensor | None:
        """hidden [n, hidden] -> [n, vocab_size] float32 on rank 0, None on the others, which must call it as well.

        `segments` are runs of rows of `hidden`, for adapters that touch the lm head.
        """
        logits = self.group.gather(self.lm_head(hidden, segments), self.cut.lm_head_widths)
        return None if logits is None else logits.float()

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """An empty cache of this rank's KV heads, on the decoder's device."""
        return KVCache(
            self.spec.layers, self.cut.kv_heads, self.spec.head_dim, num_blocks, block_size, self.dtype, self.cos.device
        )

    def cache_block_bytes(self, block_size: int) -> int:
        """Bytes that one block of such a cache takes on this rank."""
        return KVCache.block_bytes(self.spec.layers, self.cut.kv_heads, self.spec.head_dim, block_size, self.dtype)

    def _prepare(self, batch: Batch, cache: KVCache) -> StepInputs:
        first_of_block = batch.cache_indices % cache.block_size == 0
        cache.clear(batch.cache_indices[first_of_block] // cache.block_size)
        return StepInputs(
            segments=batch.segments,
            cos=self.cos[batch.positions, None].to(self.dtype),
            sin=self.sin[batch.positions, None].to(self.dtype),
            cache_indices=batch.cache_indices,
            reads={w: prepare_reads(batch, cache.block_size, w, self.dtype) for w in set(self.spec.windows)},
        )
