"""The operations that the decoder is made of, and what they take. Whoever implements them knows the device; the model
does not. `reference.py` says in plain torch what each of them computes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from loraplex_shard.device.parallel import Group
from loraplex_shard.ops.quantized import QuantizedMatrix
from loraplex_shard.shapes.batch import Batch, Segment
from loraplex_shard.shapes.cache import KVCache, LayerCache
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import LinearLayout

# What the functions between an MLP's layers are called here; kernels know them by their places in this list.
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "clamped_swiglu"]


@dataclass(frozen=True, slots=True)
class Norm:
    """x over the root of its mean square (arXiv 1910.07467), times weight, plus bias. Of centered ones, the mean is
    subtracted first (arXiv 1607.06450)."""

    weight: torch.Tensor  # [n] float32
    bias: torch.Tensor | None  # [n] float32
    eps: float
    centered: bool


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norm of queries and keys before they are rotated: of each head by itself, or over all heads of a token."""

    weight: torch.Tensor  # [query + kv heads, dim] float32
    eps: float
    squares: torch.Tensor | None = None  # [tokens, 2] float32, over all heads: mean square of queries, and of keys


@dataclass(frozen=True, slots=True)
class Rotary:
    """The angles of a rotary embedding (arXiv 2104.09864), by position. It turns the first dimensions of each head, as
    many as there are columns; the others stay as they are."""

    cos: torch.Tensor  # [positions, rotated dimensions] float32: each pair's numbers where the pair is
    sin: torch.Tensor  # likewise, negated for the first of each pair
    interleaved: bool = False  # pairs are neighbours; else the first of them are in one half, the second in the other
    query_scale: torch.Tensor | None = None  # [positions] float32: what queries are multiplied by

    def to(self, device: torch.device) -> "Rotary":
        scale = None if self.query_scale is None else self.query_scale.to(device)
        return Rotary(self.cos.to(device), self.sin.to(device), self.interleaved, scale)


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token has. Pair p is token p // chosen and one of its experts; pairs are computed in the order
    of their experts, those of one expert in the order of their tokens."""

    weights: torch.Tensor  # [pairs] float32: what the pair's output is multiplied by
    order: torch.Tensor  # [pairs] int64: the pair that is computed at each place
    places: torch.Tensor  # [pairs] int64: where each pair is computed
    starts: torch.Tensor  # [experts + 1] int64: the places of each expert's pairs
    chosen: int  # experts of a token


# What operations make for themselves; nobody else looks inside. A weight has `nbytes`, and `part(rows)`: some of its
# rows, without a copy, of which the first must be a multiple of 16.
Weight = Any
# What all layers need of one step's batch, made once.
Step = Any

Segments = tuple[Segment, ...]


class Operations(Protocol):
    """All tensors are of one float dtype and on one device unless said otherwise; results are new tensors."""

    def pack(self, matrix: torch.Tensor | QuantizedMatrix) -> Weight:
        """Matrices [out_features, in_features] as `linear` and `embedding` take them."""
        ...

    def prepare(self, batch: Batch) -> Step:
        """What the operations below take for this batch."""
        ...

    def forward(self, step: Step, cache: KVCache, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `compute` returns, [tokens, n]; it may be overwritten by the next forward with this cache.

        compute may do nothing but call operations, and must call the same ones for every batch of as many tokens: what
        it did may be done again without it. A group of several ranks must share memory.
        """
        ...

    def embedding(self, step: Step, weight: Weight, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        """The weight's rows for the step's tokens, times scale: [tokens, columns], of the model's dtype."""
        ...

    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in_features] -> [tokens, out_features], sums in float32.

        Where the weight is quantized, x is rounded to 8 bits in groups of the weight's size, each with its own scale.
        """
        ...

    def add_lora_delta(
        self, out: torch.Tensor, x: torch.Tensor, segments: Step | Segments, layout: LinearLayout
    ) -> None:
        """Adds scale * B(A x) to the layer's output `out` [tokens, out_features], in place, for a step's own segments
        or others. Where an adapter has factors and shifts for outputs, they are multiplied and shifted before.

        x [tokens, in_features] is the layer's input, never quantized. Tokens outside the segments, and layers that an
        adapter does not touch, stay as they are. Each adapter is computed at its own lora_rank (arXiv 2106.09685).
        """
        ...

    def route(self, logits: torch.Tensor, chosen: int, normalized: bool) -> Routing:
        """The experts of which each row of logits [tokens, experts] has the largest, weighted by the row's softmax. In
        normalized ones, a token's weights add up to 1, as if the softmax were of the chosen ones alone."""
        ...

    def dispatch(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The row of x [tokens, n] that each pair reads, in the order in which pairs are computed: [pairs, n]."""
        ...

    def stack(self, weights: Sequence[Weight], biases: Sequence[torch.Tensor | None]) -> Weight:
        """The packed weights and the biases of all experts, as `expert_linear` takes them."""
        ...

    def expert_linear(self, x: torch.Tensor, routing: Routing, weight: Weight) -> torch.Tensor:
        """`linear` of each pair's row of x [pairs, in_features] with its expert's weight: [pairs, out_features]."""
        ...

    def add_expert_lora_delta(
        self, out: torch.Tensor, x: torch.Tensor, step: Step, routing: Routing, layouts: Sequence[LinearLayout]
    ) -> None:
        """`add_lora_delta` of each pair's row with what the token's adapter has for the expert, whose layouts these
        are."""
        ...

    def combine(
        self, x: torch.Tensor, routing: Routing, shared: torch.Tensor | None = None, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sum of each token's pairs, which are rows of x [pairs, n], by their weights: [tokens, n].

        `shared` [tokens, n] is added, times the sigmoid of `gate` [tokens, 1] if there is one.
        """
        ...

    def all_reduce_(self, tensor: torch.Tensor, group: Group) -> None:
        """Replaces `tensor` by its sum over the group's ranks. Raises once a rank is lost, as the group does."""
        ...

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """x [tokens, n], normalized in float32."""
        ...

    def add_norm(self, hidden: torch.Tensor, delta: torch.Tensor, scale: float, norm: Norm) -> torch.Tensor:
        """Adds scale * delta to hidden, in place, and returns the norm of that."""
        ...

    def add_(self, hidden: torch.Tensor, delta: torch.Tensor, scale: float) -> None:
        """Adds scale * delta to hidden [tokens, n]."""
        ...

    def activate(self, x: torch.Tensor, function: Activation, gated: bool) -> torch.Tensor:
        """The function of x [tokens, n]. Gated: of the first half of each row, times the second (arXiv 2002.05202)."""
        ...

    def upcast(self, x: torch.Tensor, scale: float = 1.0, soft_cap: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """x [rows, n] times scale in float32, and whether all numbers of a row are finite: [rows] bool.

        With a soft cap they become soft_cap * tanh(number / soft_cap).
        """
        ...

    def head_squares(self, qkv: torch.Tensor, heads: Heads, query: float, key: float) -> torch.Tensor:
        """The sum of squares of each token's query heads, times `query`, and of its key heads, times `key`: [tokens, 2]
        float32."""
        ...

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        heads: Heads,
        norms: HeadNorms | None,
        rotary: Rotary | None,
        step: Step,
        cache: LayerCache,
    ) -> None:
        """Normalizes and rotates queries and keys in place, each if it is asked for; writes keys and values to the
        cache. qkv is [tokens, heads.width]."""
        ...

    def attention(
        self, qkv: torch.Tensor, heads: Heads, step: Step, cache: LayerCache, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Softmax attention of the queries, each token's first numbers in qkv, over the cache: [tokens, out_width].

        The cache already holds the step's own tokens; a token sees itself and what is before it, within the window.
        sinks [query heads] float32 are scores of one more position, which has no value (arXiv 2309.17453).
        """
        ...
