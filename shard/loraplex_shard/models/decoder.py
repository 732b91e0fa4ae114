"""The decoder: embedding, layers of attention and MLP, final norm, lm head. What differs by model is in its spec.

It says what is computed. How a layer is cut over ranks and what adapters add is the layers' business; how it is
computed on this device, the operations'.
"""

from dataclasses import dataclass

import torch
from torch import nn

from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.embedding import Embedding
from loraplex_shard.layers.linear import ColumnLinear, RowLinear
from loraplex_shard.layers.norm import HeadNorm, RmsNorm
from loraplex_shard.models.partition import DecoderPartition
from loraplex_shard.models.spec import DecoderSpec
from loraplex_shard.ops.base import Operations, Rotary, Step
from loraplex_shard.shapes.batch import Batch, Segment
from loraplex_shard.shapes.cache import KVCache, LayerCache
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import LinearLayout

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # as checkpoints call them


@dataclass(frozen=True, slots=True)
class Build:
    """What every layer is made from."""

    spec: DecoderSpec
    partition: DecoderPartition
    group: Group
    ops: Operations
    rotary: Rotary


class Attention(nn.Module):
    def __init__(self, index: int, build: Build) -> None:
        super().__init__()
        spec, partition, self.ops = build.spec, build.partition, build.ops
        self.rotary = build.rotary
        self.heads = Heads(partition.heads, partition.kv_heads, spec.head_dim, spec.windows[index])
        self.qkv = ColumnLinear(partition.qkv(index), spec.qkv_bias, self.ops)
        self.o = RowLinear(partition.o(index), spec.o_bias, self.ops, build.group)
        self.head_norm = None
        if spec.qk_norm:
            prefix = f"model.layers.{index}.self_attn"
            names = f"{prefix}.q_norm.weight", f"{prefix}.k_norm.weight"
            self.head_norm = HeadNorm(
                *names, partition.heads, partition.kv_heads, spec.head_dim, spec.norm_eps, self.ops
            )

    def forward(self, hidden: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        qkv = self.qkv(hidden, step)
        norms = None if self.head_norm is None else self.head_norm()
        self.ops.rotate_and_write(qkv, self.heads, norms, self.rotary, step, cache)
        out: torch.Tensor = self.o(self.ops.attention(qkv, self.heads, step, cache), step)
        return out


class Mlp(nn.Module):
    def __init__(self, index: int, build: Build) -> None:
        super().__init__()
        self.ops = build.ops
        self.gate_up = ColumnLinear(build.partition.gate_up(index), build.spec.mlp_bias, self.ops)
        self.down = RowLinear(build.partition.down(index), build.spec.mlp_bias, self.ops, build.group)

    def forward(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        out: torch.Tensor = self.down(self.ops.silu_mul(self.gate_up(hidden, step)), step)
        return out


class DecoderLayer(nn.Module):
    def __init__(self, index: int, build: Build) -> None:
        super().__init__()
        spec, prefix = build.spec, f"model.layers.{index}"
        self.attention_norm = RmsNorm(f"{prefix}.input_layernorm.weight", spec.hidden_size, spec.norm_eps, build.ops)
        self.attention = Attention(index, build)
        self.mlp_norm = RmsNorm(f"{prefix}.post_attention_layernorm.weight", spec.hidden_size, spec.norm_eps, build.ops)
        self.mlp = Mlp(index, build)

    def forward(self, hidden: torch.Tensor, delta: torch.Tensor | None, step: Step, cache: LayerCache) -> torch.Tensor:
        """Adds delta and its own attention to hidden, in place. Returns what its MLP adds: the next layer's delta."""
        delta = self.attention(self.attention_norm(hidden, delta), step, cache)
        out: torch.Tensor = self.mlp(self.mlp_norm(hidden, delta), step)
        return out


class Decoder(nn.Module):
    """One rank's part of the model. `load_decoder` makes it; its parameters are on the meta device until then."""

    def __init__(
        self,
        spec: DecoderSpec,
        group: Group,
        ops: Operations,
        rotary: Rotary,
        dtype: torch.dtype,
        embedding: str = EMBEDDING,
    ) -> None:
        """`embedding` names the tensor that is the embedding."""
        super().__init__()
        partition = DecoderPartition(spec, group.rank, group.size)
        self.vocab_size = spec.vocab_size
        self.spec, self.group, self.ops, self.partition, self.dtype = spec, group, ops, partition, dtype
        build = Build(spec, partition, group, ops, rotary)
        self.embedding = Embedding(embedding, spec.vocab_size, spec.hidden_size, ops)
        self.layers = nn.ModuleList(DecoderLayer(index, build) for index in range(spec.layers))
        self.norm = RmsNorm("model.norm.weight", spec.hidden_size, spec.norm_eps, ops)
        self.lm_head = ColumnLinear(partition.lm_head(), bias=False, ops=ops, least_bits=8)
        self.device = rotary.cos.device

    @property
    def layouts(self) -> tuple[LinearLayout, ...]:
        """All linear layers of this rank, the lm head included."""
        return tuple(module.layout for module in self.modules() if isinstance(module, ColumnLinear | RowLinear))

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Computes the batch's tokens and writes their keys and values: [tokens, hidden], after the final norm."""
        step = self.ops.prepare(batch)
        if self.group.size > 1 and self.group.shared is None:
            return self._compute(step, cache)
        return self.ops.forward(step, cache, lambda: self._compute(step, cache))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, segments: tuple[Segment, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """hidden [n, hidden] -> logits [n, vocab_size] float32, and whether all of each row are finite [n] bool, on
        rank 0; None on the others, which must call it as well.

        `segments` are runs of rows of `hidden`, for adapters that touch the lm head.
        """
        logits = self.group.gather(self.lm_head(hidden, segments), self.partition.lm_head_widths)
        return None if logits is None else self.ops.upcast(logits)

    def new_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache of this rank's KV heads, on the decoder's device; of its dtype, or of torch.int8."""
        return KVCache(self._heads, num_blocks, block_size, dtype or self.dtype, self.device)

    def cache_block_bytes(self, block_size: int, dtype: torch.dtype | None = None) -> int:
        """Bytes that one block of such a cache takes on this rank."""
        return KVCache.block_bytes(self._heads, block_size, dtype or self.dtype)

    @property
    def _heads(self) -> list[Heads]:
        return [module.heads for module in self.modules() if isinstance(module, Attention)]

    def _compute(self, step: Step, cache: KVCache) -> torch.Tensor:
        hidden, delta = self.embedding(step, self.dtype), None
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            delta = layer(hidden, delta, step, layer_cache)
        normed: torch.Tensor = self.norm(hidden, delta)
        return normed
