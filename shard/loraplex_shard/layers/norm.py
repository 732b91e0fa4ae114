"""Normalization layers. Every rank has all of them. Their parameters are float32 in every model."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from loraplex_shard.device.parallel import Group, HeadPartition
from loraplex_shard.layers.parameters import LoadableLayer, TensorSlice
from loraplex_shard.ops.base import HeadNorms, Norm, Operations, Step
from loraplex_shard.shapes.heads import Heads


@dataclass(frozen=True, slots=True)
class NormSpec:
    """How a model normalizes: with RMS norm or, if `centered`, with layer norm."""

    eps: float
    centered: bool = False
    bias: bool = False
    plus: float = 0.0  # added to each weight of the checkpoint


class NormLayer(LoadableLayer):
    """A norm. An adapter may replace it by one of its own."""

    index = 0  # the model's number for its first parameter; each norm has two numbers


class HiddenNorm(NormLayer):
    """The norm of hidden states, after a layer's delta is added to them."""

    scale: nn.Parameter  # [hidden]
    bias: nn.Parameter | None

    def __init__(self, module: str, hidden_size: int, spec: NormSpec, delta_scale: float, ops: Operations) -> None:
        """Deltas are multiplied by `delta_scale`."""
        super().__init__(ops)
        self.spec, self.delta_scale, shape = spec, delta_scale, (hidden_size,)
        self.declare("scale", shape, TensorSlice(f"{module}.weight", shape), dtype=torch.float32, plus=spec.plus)
        self.register_parameter("bias", None)
        if spec.bias:
            self.declare("bias", shape, TensorSlice(f"{module}.bias", shape), dtype=torch.float32)

    def forward(self, hidden: torch.Tensor, step: Step, delta: torch.Tensor | None = None) -> torch.Tensor:
        """Adds delta, if there is one, to hidden [tokens, hidden] in place. Returns the norm of hidden."""
        norm = Norm(self.scale, self.bias, self.spec.eps, self.spec.centered, self.index)
        if delta is None:
            return self.ops.norm(hidden, norm, step)
        return self.ops.add_norm(hidden, delta, self.delta_scale, norm, step)


class HeadNorm(NormLayer):
    """The norm of queries and keys, for each head by itself."""

    scale: nn.Parameter  # [query + KV heads, dim]: one row per head, so that one operation does queries and keys

    def __init__(self, attention: str, heads: Heads, spec: NormSpec, ops: Operations) -> None:
        super().__init__(ops)
        self.eps, shape = spec.eps, (heads.dim,)
        self.declare(
            "scale",
            (heads.query + heads.kv, heads.dim),
            TensorSlice(f"{attention}.q_norm.weight", shape, repeat=heads.query),
            TensorSlice(f"{attention}.k_norm.weight", shape, repeat=heads.kv),
            dtype=torch.float32,
            plus=spec.plus,
        )

    def forward(self, qkv: torch.Tensor) -> HeadNorms:
        return HeadNorms(self.scale, self.eps, index=self.index)


class WidthNorm(NormLayer):
    """The norm of queries over all query heads of a token, and of keys over all key heads, including other ranks'."""

    scale: nn.Parameter  # [query + KV heads, dim]

    def __init__(
        self, attention: str, whole: Heads, part: HeadPartition, spec: NormSpec, group: Group, ops: Operations
    ) -> None:
        """`whole` are the model's heads, and `part` is this rank's part of them."""
        super().__init__(ops)
        query, kv, dim = part.query, part.kv, whole.dim
        self.eps, self.group = spec.eps, group
        self.heads = replace(whole, query=query.stop - query.start, kv=kv.stop - kv.start)
        # Keys that several ranks hold are counted once: each of these ranks adds its fraction.
        self.means = 1 / (whole.query * dim), 1 / (whole.kv * dim * part.kv_copies)
        self.declare(
            "scale",
            (self.heads.query + self.heads.kv, dim),
            TensorSlice(f"{attention}.q_norm.weight", (whole.query * dim,), slice(query.start * dim, query.stop * dim)),
            TensorSlice(f"{attention}.k_norm.weight", (whole.kv * dim,), slice(kv.start * dim, kv.stop * dim)),
            dtype=torch.float32,
            plus=spec.plus,
        )

    def forward(self, qkv: torch.Tensor) -> HeadNorms:
        squares = self.ops.head_squares(qkv, self.heads, *self.means)
        self.ops.all_reduce_(squares, self.group)
        return HeadNorms(self.scale, self.eps, squares, self.index)
