"""The decoder: embedding, layers of attention and MLP, final norm, lm head. What differs between models is in the spec.

The decoder says what is computed. Layers know how they are cut for ranks and what adapters add; operations know how
something is computed on this device.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.embedding import Embedding
from loraplex_shard.layers.linear import ColumnLinear, Linear, RowLinear
from loraplex_shard.layers.norm import HeadNorm, HiddenNorm, NormLayer, WidthNorm
from loraplex_shard.layers.own_head import own_all_logits, put_own_logits, with_vocabularies
from loraplex_shard.layers.sinks import Sinks
from loraplex_shard.lora.peft.base import ServedMatrices, ServedWeights, StoredTensors
from loraplex_shard.models.build import Build
from loraplex_shard.models.mlp import MixtureOfExperts, Mlp
from loraplex_shard.models.partition import DecoderPartition
from loraplex_shard.models.spec import DecoderSpec, RotarySpec
from loraplex_shard.ops.base import Operations, Outputs, Rotary, Step
from loraplex_shard.shapes.batch import Inputs, Segment
from loraplex_shard.shapes.cache import KVCache, LayerCache
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import HEAD, LinearLayout, VocabularyLayout


class Attention(nn.Module):
    def __init__(self, index: int, build: Build) -> None:
        super().__init__()
        spec, partition, self.ops = build.spec, build.partition, build.ops
        whole = Heads(
            query=spec.heads,
            kv=spec.kv_heads,
            dim=spec.head_dim,
            window=spec.windows[index],
            soft_cap=spec.attention_soft_cap,
            scale=spec.attention_scale,
        )
        self.heads = replace(whole, query=partition.heads, kv=partition.kv_heads)
        self.norm: HeadNorm | WidthNorm | None = None
        prefix = f"{spec.names.layer(index)}.self_attn"
        if spec.qk_norm == "head":
            self.norm = HeadNorm(prefix, self.heads, spec.norm, self.ops)
        elif spec.qk_norm == "width":
            self.norm = WidthNorm(prefix, whole, partition.head_partition, spec.norm, build.group, self.ops)
        rotary = spec.rotary[index]
        self.rotary = None if rotary is None else build.rotary[rotary]
        self.qkv = ColumnLinear(partition.qkv(index), spec.qkv_bias, self.ops)
        self.sinks = Sinks(prefix, spec.heads, partition.head_partition.query, self.ops) if spec.sinks else None
        self.o = RowLinear(partition.o(index), spec.o_bias, self.ops, build.group)

    def forward(self, hidden: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        qkv = self.qkv(hidden, step)
        norms = None if self.norm is None else self.norm(qkv)
        self.ops.rotate_and_write(qkv, self.heads, norms, self.rotary, step, cache)
        sinks = None if self.sinks is None else self.sinks.scores
        out: torch.Tensor = self.o(self.ops.attention(qkv, self.heads, step, cache, sinks), step)
        return out


class DecoderLayer(nn.Module):
    def __init__(self, index: int, build: Build) -> None:
        super().__init__()
        spec, names = build.spec, build.spec.names
        self.spec, self.ops = spec, build.ops

        def norm(module: str | None) -> HiddenNorm | None:
            return None if module is None else build.norm(f"{names.layer(index)}.{module}")

        self.before_attention = norm(names.before_attention)
        self.attention = Attention(index, build)
        self.behind_attention = norm(names.behind_attention)
        self.before_mlp = norm(names.before_mlp)
        self.mlp = (MixtureOfExperts if spec.has_experts(index) else Mlp)(index, build)
        self.behind_mlp = norm(names.behind_mlp)

    def forward(self, hidden: torch.Tensor, delta: torch.Tensor | None, step: Step, cache: LayerCache) -> torch.Tensor:
        """Adds delta and the attention's output to hidden, in place. Returns the MLP's output: the next layer's
        delta."""
        x = self._added(hidden, delta, self.before_attention, step)
        if self.spec.parallel:
            beside = x if self.before_mlp is None else self.before_mlp(hidden, step)
            self._added(hidden, self._attended(x, step, cache), None, step)
            x = beside
        else:
            x = self._added(hidden, self._attended(x, step, cache), self.before_mlp, step)
        return _normed(self.mlp(x, step), self.behind_mlp, step)

    def _attended(self, x: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        return _normed(self.attention(x, step, cache), self.behind_attention, step)

    def _added(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, norm: HiddenNorm | None, step: Step
    ) -> torch.Tensor:
        """Adds delta to hidden. Returns the norm of hidden, or hidden itself if there is no norm."""
        if norm is not None:
            normed: torch.Tensor = norm(hidden, step, delta)
            return normed
        if delta is not None:
            self.ops.add_(hidden, delta, self.spec.residual_scale)
        return hidden


class Decoder(nn.Module):
    """A rank's part of the model. `load_decoder` makes it; its parameters are on the meta device until then."""

    tensors: StoredTensors  # what it is loaded from
    served: ServedWeights | None  # its weights as it computes with them
    matrices: ServedMatrices  # the same

    def __init__(
        self,
        spec: DecoderSpec,
        group: Group,
        ops: Operations,
        rotary: Mapping[RotarySpec, Rotary],
        device: torch.device,
        dtype: torch.dtype,
        embedding: str,
    ) -> None:
        """`rotary` has the angles of each of the spec's rotary embeddings; `embedding` is the name of the embedding's
        tensor."""
        super().__init__()
        partition = DecoderPartition(spec, group.rank, group.size)
        self.modeling_code, self.state_bytes, self.uncalled = "loraplex", 0, ()
        self.embedding_name, self.head_name = spec.names.embedding, HEAD  # as PEFT calls these modules
        self.vocab_size = spec.vocab_size
        self.spec, self.group, self.ops, self.partition = spec, group, ops, partition
        self.device, self.dtype = device, dtype
        build = Build(spec, partition, group, ops, rotary)
        scale = float(torch.tensor(spec.embedding_scale, dtype=dtype))  # as transformers rounds it
        self.embedding = Embedding(embedding, spec.vocab_size, spec.hidden_size, scale, ops)
        self.layers = nn.ModuleList(DecoderLayer(index, build) for index in range(spec.layers))
        self.norm = build.norm(f"{spec.names.backbone}.{spec.names.final_norm}")
        self.generates = spec.has_head
        if spec.has_head:
            self.lm_head = ColumnLinear(partition.lm_head(), spec.head_bias, ops=ops, least_bits=8)
        for number, layer in enumerate(module for module in self.modules() if isinstance(module, NormLayer)):
            layer.index = 2 * number

    @property
    def layouts(self) -> tuple[LinearLayout, ...]:
        """The layouts of all linear layers of this rank, including the lm head if there is one."""
        return tuple(module.layout for module in self.modules() if isinstance(module, Linear))

    @property
    def vocabulary(self) -> VocabularyLayout:
        spec = self.spec
        norms = 2 * sum(isinstance(module, NormLayer) for module in self.modules())
        scale = self.embedding.scale
        names = self.embedding_name, self.head_name
        return VocabularyLayout(*names, spec.vocab_size, spec.hidden_size, scale, self.dtype, norms)

    @torch.inference_mode()
    def forward(self, inputs: Inputs, cache: KVCache) -> Outputs:
        """Computes the inputs' tokens and writes their keys and values to the cache. Hidden states are those after the
        final norm."""
        return self.ops.forward(
            inputs, cache, self.group, lambda step: self._compute(step, cache), lambda hidden: self.logits(hidden, ())
        )

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, segments: tuple[Segment, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """hidden [n, hidden] -> logits [n, vocab_size] float32, and whether all numbers of a row are finite, [n] bool.
        The result is on rank 0. The other ranks must call it as well, and get None.

        `segments` are runs of rows of `hidden`, for adapters that touch the lm head. The largest vocabulary among them
        counts; tokens that a row does not have are -inf.
        """
        width = self.partition.lm_head_widths[self.group.rank]
        owned = own_all_logits(segments, len(hidden), width)
        out = hidden.new_empty((len(hidden), width)) if owned else self.lm_head(hidden, segments)
        put_own_logits(self.ops, out, hidden, segments)
        logits = self.group.gather(out, self.partition.lm_head_widths)
        if logits is None:
            return None
        scale, cap = self.spec.logit_scale, self.spec.logit_soft_cap
        return with_vocabularies(self.ops, logits, hidden, segments, scale, cap)

    def new_cache(
        self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None, sequences: int = 0
    ) -> KVCache:
        """An empty cache of this rank's KV heads, on the decoder's device. `dtype` is the decoder's by default, or
        one of SCALED."""
        dtype, first = dtype or self.dtype, self.ops.positions_first
        return KVCache(self._heads, num_blocks, block_size, dtype, self.device, positions_first=first)

    def cache_block_bytes(self, block_size: int, dtype: torch.dtype | None = None) -> int:
        """The size of a block of such a cache on this rank, in bytes."""
        return KVCache.block_bytes(self._heads, block_size, dtype or self.dtype)

    @property
    def _heads(self) -> list[Heads]:
        return [module.heads for module in self.modules() if isinstance(module, Attention)]

    def _compute(self, step: Step, cache: KVCache) -> torch.Tensor:
        hidden, delta = self.embedding(step, self.dtype), None
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            delta = layer(hidden, delta, step, layer_cache)
        normed: torch.Tensor = self.norm(hidden, step, delta)
        return normed


def _normed(out: torch.Tensor, norm: HiddenNorm | None, step: Step) -> torch.Tensor:
    return out if norm is None else norm(out, step)
