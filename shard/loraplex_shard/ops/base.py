"""The operations that the decoder is made of, and what they take. An implementation knows its device; the model does
not. `reference.py` says in plain torch what each of them computes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from loraplex_shard.device.parallel import Group
from loraplex_shard.ops.quantized import Quantized
from loraplex_shard.shapes.batch import Batch, Inputs, Segment
from loraplex_shard.shapes.cache import KVCache, LayerCache
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import LinearLayout

# The names of the functions between an MLP's layers. Kernels know a function by its index in this list.
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "clamped_swiglu"]


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm: x divided by the root of its mean square (arXiv 1910.07467), times weight, plus bias. If `centered`,
    the mean is subtracted first, as in layer norm (arXiv 1607.06450)."""

    weight: torch.Tensor  # [n] float32
    bias: torch.Tensor | None  # [n] float32
    eps: float
    centered: bool
    index: int = 0  # of the weight among the parameters of all norms; the bias has the next one


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norm of queries and keys before they are rotated, either per head or over all heads of a token."""

    weight: torch.Tensor  # [query + kv heads, dim] float32
    eps: float
    squares: torch.Tensor | None = None  # [tokens, 2] float32: mean squares of queries and of keys over all heads
    index: int = 0  # the weight's number among the parameters of all norms


@dataclass(frozen=True, slots=True)
class Rotary:
    """The angles of a rotary embedding (arXiv 2104.09864), by position. The first dimensions of each head are rotated,
    one for each column here; the others stay as they are."""

    cos: torch.Tensor  # [positions, rotated dimensions] float32, in the order of the dimensions
    sin: torch.Tensor  # like cos, negated for the first dimension of each pair
    interleaved: bool = False  # a pair is two neighbours; otherwise one from the first half and one from the second
    query_scale: torch.Tensor | None = None  # [positions] float32: queries are multiplied by this

    def to(self, device: torch.device) -> "Rotary":
        scale = None if self.query_scale is None else self.query_scale.to(device)
        return Rotary(self.cos.to(device), self.sin.to(device), self.interleaved, scale)


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token has. Pair p is token p // chosen with one of its experts. Pairs are computed in the
    order of their experts, and pairs of the same expert in the order of their tokens."""

    weights: torch.Tensor  # [pairs] float32: the pair's output is multiplied by this
    order: torch.Tensor  # [pairs] int64: the pair that is computed at each place
    places: torch.Tensor  # [pairs] int64: the place at which each pair is computed
    starts: torch.Tensor  # [experts + 1] int64: expert e's pairs are at places starts[e] to starts[e + 1]
    chosen: int  # experts per token


# Made by the operations for themselves; nobody else looks inside. A weight has `nbytes`, and `part(rows)` returns some
# of its rows without a copy. The first of these rows must be a multiple of 16. One of floats has `map(function)`, which
# replaces its tensor.
Weight = Any
# What all layers need to know of one step's batch. It is made once per step.
Step = Any

Segments = tuple[Segment, ...]


Scored = tuple[torch.Tensor, torch.Tensor]
"""Logits [n, vocab] float32, and whether they are finite, [n] bool."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a forward pass has computed. If the inputs have draws, it may have sampled along with it."""

    hidden: torch.Tensor  # [tokens, n], the input of the lm head
    # By the draws, and appended to their rows: [tokens] int64, on all ranks. None: nothing was sampled.
    tokens: torch.Tensor | None = None
    scored: Scored | None = None  # then: what they were sampled from, on rank 0 alone

    def first(self, count: int) -> "Outputs":
        """Those of the first tokens."""
        tokens, scored = self.tokens, self.scored
        return Outputs(
            self.hidden[:count],
            None if tokens is None else tokens[:count],
            None if scored is None else (scored[0][:count], scored[1][:count]),
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [each for each in (self.hidden, self.tokens, *(self.scored or ())) if each is not None]


Compute = Callable[[Step], torch.Tensor]
Score = Callable[[torch.Tensor], Scored | None]


class Operations(Protocol):
    """All tensors have the same float dtype and device unless a docstring says otherwise. Results are new tensors."""

    positions_first: bool
    """The form of the KV cache: whether a position's heads lie side by side in memory (see LayerCache)."""
    recorded_sizes: tuple[int, ...]
    """Numbers of tokens for which forward passes are recorded. It takes longer than a step: better before serving."""

    def pack(self, matrix: torch.Tensor | Quantized) -> Weight:
        """Packs a matrix [out_features, in_features] for `linear` and `embedding`."""
        ...

    def prepare(self, batch: Batch) -> Step:
        """Returns the step that the operations below take for this batch."""
        ...

    def forward(self, inputs: Inputs, cache: KVCache, group: Group, compute: Compute, score: Score) -> Outputs:
        """Computes a step. The next forward with this cache may overwrite what it returns.

        `compute` returns the hidden states [tokens, n] of a step, `score` the logits [n, vocab] float32 after hidden
        states, by the base's lm head, and whether they are finite [n]; None on ranks other than 0. Both may only call
        operations, and must call the same ones for every batch with the same number of tokens, because their calls may
        be recorded and repeated without them. They may use the group's collectives. The step may have more tokens than
        the inputs, of which only the first are returned.
        """
        ...

    def embedding(self, step: Step, weight: Weight, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        """Returns the weight's rows for the step's tokens, times scale: [tokens, columns] in the model's dtype. Where
        a token's adapter has embeddings of its own, returns those."""
        ...

    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tokens, in_features] -> [tokens, out_features], summed in float32.

        If the weight is quantized, x is rounded: to float8 with a scale per token if the weight is float8, else to 8
        bits in groups of the weight's group size, each with its own scale; or to bfloat16, which is more exact.
        """
        ...

    def put_linear(self, out: torch.Tensor, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> None:
        """Writes what `linear` returns to `out` [tokens, out_features], which is contiguous."""
        ...

    def add_lora_delta(
        self, out: torch.Tensor, x: torch.Tensor, segments: Step | Segments, layout: LinearLayout
    ) -> None:
        """Adds scale * B(A x) to the layer's output `out` [tokens, out_features] in place, for the step's own segments
        or for other ones. If an adapter has factors and shifts for its outputs, they are applied to `out` first.

        x [tokens, in_features] is the layer's input and is never quantized. Tokens outside the segments, and layers
        that an adapter does not touch, stay as they are. Each adapter is computed at its own lora_rank
        (arXiv 2106.09685).
        """
        ...

    def route(self, logits: torch.Tensor, chosen: int, normalized: bool) -> Routing:
        """Chooses the experts with the largest logits in each row of logits [tokens, experts], weighted by the row's
        softmax. If `normalized`, a token's weights add up to 1, as if the softmax were over its chosen experts alone.
        """
        ...

    def dispatch(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Returns the row of x [tokens, n] that each pair reads: [pairs, n], in the order in which pairs are computed.

        This is the input of `expert_linear`.
        """
        ...

    def stack(self, weights: Sequence[Weight], biases: Sequence[torch.Tensor | None]) -> Weight:
        """Combines the packed weights and the biases of all experts for `expert_linear`."""
        ...

    def expert_linear(self, x: torch.Tensor, routing: Routing, weight: Weight) -> torch.Tensor:
        """`linear` for each pair's row of x [pairs, in_features] with its expert's weight: [pairs, out_features]."""
        ...

    def add_expert_lora_delta(
        self, out: torch.Tensor, x: torch.Tensor, step: Step, routing: Routing, layouts: Sequence[LinearLayout]
    ) -> None:
        """`add_lora_delta` for each pair's row, with the weights that the token's adapter has for the pair's expert.
        There is one layout per expert."""
        ...

    def combine(
        self, x: torch.Tensor, routing: Routing, shared: torch.Tensor | None = None, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the weighted sum of each token's pairs, which are rows of x [pairs, n]: [tokens, n].

        `shared` [tokens, n] is added, times the sigmoid of `gate` [tokens, 1] if there is a gate.
        """
        ...

    def all_reduce_(self, tensor: torch.Tensor, group: Group) -> None:
        """Replaces `tensor` by its sum over the group's ranks. Raises what the group raises when a rank is lost."""
        ...

    def norm(self, x: torch.Tensor, norm: Norm, step: Step | None = None) -> torch.Tensor:
        """Returns x [tokens, n], normalized in float32. With a step, parameters that a token's adapter has of its own
        replace the norm's."""
        ...

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, scale: float, norm: Norm, step: Step | None = None
    ) -> torch.Tensor:
        """Adds scale * delta to hidden in place, and returns the norm of the sum."""
        ...

    def add_(self, hidden: torch.Tensor, delta: torch.Tensor, scale: float) -> None:
        """Adds scale * delta to hidden [tokens, n] in place."""
        ...

    def activate(self, x: torch.Tensor, function: Activation, gated: bool) -> torch.Tensor:
        """Applies the function to x [tokens, n]. If `gated`, it is applied to the first half of each row, and the
        result is multiplied by the second half (arXiv 2002.05202)."""
        ...

    def upcast(
        self, x: torch.Tensor, scale: float = 1.0, soft_cap: float = 0.0, width: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x [rows, n] times scale in float32, and whether all numbers of a row are finite: [rows] bool.

        With a soft cap, each number becomes soft_cap * tanh(number / soft_cap). Rows of fewer than `width` numbers are
        filled up with -inf.
        """
        ...

    def head_squares(self, qkv: torch.Tensor, heads: Heads, query: float, key: float) -> torch.Tensor:
        """Returns two sums for each token: the squares of its query heads, times `query`, and the squares of its key
        heads, times `key`. [tokens, 2] float32."""
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
        """Normalizes queries and keys in place if there are norms, which adapters may replace; rotates them if there is
        a rotary embedding, and writes keys and values to the cache. qkv is [tokens, heads.width]."""
        ...

    def attention(
        self, qkv: torch.Tensor, heads: Heads, step: Step, cache: LayerCache, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Softmax attention of the queries over the cache: [tokens, out_width]. A token's queries come first in its row
        of qkv.

        The cache already holds the step's own tokens. A token sees itself and the tokens before it, within the window.
        sinks [query heads] float32 are the scores of one more position, which has no value (arXiv 2309.17453).
        """
        ...
