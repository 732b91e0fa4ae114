"""An adapter's deltas to the whole model's linear layers, and the part of them that one rank's layers use.

Knows nothing about files or slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.sources.text_files import AdapterText
from loraplex_shard.lora.weights.arena import in_one_piece
from loraplex_shard.shapes.adapter import AdapterWeights, Expansion, LayerWeights
from loraplex_shard.shapes.classifier import Classifier
from loraplex_shard.shapes.layout import LinearLayout, LinearPart, count_indices
from loraplex_shard.shapes.own_weights import NOTHING, OwnWeights


@dataclass(frozen=True, slots=True)
class OwnRows:
    """Rows of a matrix of tokens that are the adapter's own. Nothing is added to them."""

    count: int  # tokens of the whole matrix, which may be more or fewer than the model has
    ids: torch.Tensor  # [n] int64, ascending
    rows: torch.Tensor  # [n, hidden]
    biases: torch.Tensor | None = None  # [n], for an lm head that has biases


@dataclass(frozen=True, slots=True)
class Delta:
    """What a module's output becomes: gain * output + shift + whole(x) + scale * b(a x). Tensors may have any float
    dtype. The embedding is a module that reads tokens: its in_features are the vocabulary."""

    a: torch.Tensor  # [lora_rank, in_features]
    b: torch.Tensor  # [out_features, lora_rank]
    scale: float
    gain: torch.Tensor | None = None  # [out_features]; None: 1
    shift: torch.Tensor | None = None  # [out_features]; None: 0
    whole: torch.Tensor | None = None  # [out_features, in_features]; gain is then 0, so it replaces the module's own
    own: OwnRows | None = None  # for the embedding and the lm head

    @property
    def is_plain(self) -> bool:
        """Whether the delta is only a product of A and B."""
        return self.gain is None and self.shift is None and self.whole is None and self.own is None

    @property
    def has_own_rows_alone(self) -> bool:
        return self.own is not None and not self.lora_rank and replace(self, own=None).is_plain

    @property
    def is_gain(self) -> bool:
        """Whether the delta only multiplies outputs."""
        return self.gain is not None and self.shift is None and self.whole is None and self.lora_rank == 0

    @property
    def lora_rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Invocation:
    """The tokens that activate an adapter (aLoRA). It acts from their last occurrence in a prompt on, after the first
    `lag` of them."""

    token_ids: tuple[int, ...]
    lag: int = 0


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """This rank's part of an adapter, in host memory."""

    weights: AdapterWeights  # on the CPU
    lora_rank: int  # the largest of all its modules, including those that this rank has no part of
    text: AdapterText = field(default_factory=AdapterText)  # with all of its end tokens
    warnings: tuple[str, ...] = ()  # possible problems that do not prevent serving
    invocation: Invocation | None = None  # None: it is always active
    tokenizer_json: bytes = b""  # with tokens of its own; empty: the model's
    vocab_size: int = 0  # tokens that it has embeddings for; 0: as many as the model

    @property
    def size_bytes(self) -> int:
        """What it takes of the host memory."""
        return self.weights.size_bytes + len(self.tokenizer_json)


def name_of_a(module: str) -> str:
    """PEFT's name for the tensor in an adapter's file."""
    return f"base_model.model.{module}.lora_A.weight"


def name_of_b(module: str) -> str:
    return f"base_model.model.{module}.lora_B.weight"


def partition_adapter(
    deltas: Mapping[str, Delta],
    layouts: Sequence[LinearLayout],
    dtype: torch.dtype,
    classifier: Classifier | None = None,
    own: OwnWeights = NOTHING,
) -> HostAdapter:
    """Cuts the deltas, given by module, to the layouts, converts them to the dtype, and copies them, with the
    classifier and the weights outside the linear layers, to memory of their own.

    With torch.int8, A and B are rounded, with one scale for each rank. Raises AdapterInvalidError, naming the tensor,
    for values that are not finite, or too large for the dtype.
    """
    layers = {}
    largest = max((delta.lora_rank for delta in deltas.values()), default=0)
    deltas = {module: delta for module, delta in deltas.items() if not delta.has_own_rows_alone}
    touched = [layout for layout in layouts if any(part.module in deltas for part in layout.parts)]
    for layout in touched:
        layers[layout.name] = _cut(layout, deltas, dtype)
    # A table has the thousands of rows of experts' layers only if the adapter touches experts.
    of_experts = any(layout.of_expert for layout in touched)
    held = [layout for layout in layouts if of_experts or not layout.of_expert]
    return HostAdapter(in_one_piece(layers, count_indices(held), classifier, own), largest)


def _cut(layout: LinearLayout, deltas: Mapping[str, Delta], dtype: torch.dtype) -> LayerWeights:
    """This rank's part of the deltas to a layer. The adapter touches at least one of the layer's parts."""
    shrinks: list[torch.Tensor] = []
    expansions: list[Expansion] = []
    scales: list[torch.Tensor] = []
    held = torch.float32 if dtype == torch.int8 else dtype
    start = lora_rank = 0
    for part in layout.parts:
        stop = start + part.width
        if delta := deltas.get(part.module):
            a, b = _matrices(layout, part, delta, held)
            if dtype == torch.int8:
                (a, a_scales), (b, b_scales) = _rounded(a), _rounded(b)
                scales.append(a_scales * b_scales)
            shrinks.append(a)
            rank_stop = lora_rank + len(a)
            expansions.append(Expansion(lora_rank, rank_stop, start, stop, b, _affine(layout, part, delta)))
            lora_rank = rank_stop
        start = stop
    return LayerWeights(layout.index, torch.cat(shrinks), tuple(expansions), torch.cat(scales) if scales else None)


def _matrices(
    layout: LinearLayout, part: LinearPart, delta: Delta, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's A [lora_rank, columns], and B [lora_rank, outputs] times the scale. A whole matrix becomes a B, with
    an identity matrix as its A."""
    a = converted(name_of_a(part.module), delta.a, 1.0, dtype)[:, layout.columns]
    b = converted(name_of_b(part.module), delta.b, delta.scale, dtype)
    if delta.whole is not None:
        whole = converted(f"{part.module}.weight", delta.whole, 1.0, dtype)[:, layout.columns]
        a, b = torch.cat((torch.eye(whole.shape[1], dtype=dtype), a)), torch.cat((whole, b), dim=1)
    return a, torch.cat([b[run] for run in part.rows]).T.contiguous()


def _affine(layout: LinearLayout, part: LinearPart, delta: Delta) -> torch.Tensor | None:
    """The factors and shifts of this rank's outputs. If the outputs of all ranks are summed, only rank 0 shifts
    them."""
    if delta.gain is None and delta.shift is None:
        return None
    ones = torch.ones(part.out_features)
    gain = ones if delta.gain is None else delta.gain
    shift = ones * 0 if delta.shift is None or layout.columns.start else delta.shift
    affine = torch.stack((gain.float(), shift.float()))
    if not affine.isfinite().all():
        raise AdapterInvalidError(f"the adapter's factors or shifts for {part.module} are NaN or infinite")
    return torch.cat([affine[:, run] for run in part.rows], dim=1)


def converted(name: str, tensor: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Returns the tensor times the scale, computed in float32 and rounded once."""
    tensor = tensor.to(torch.float32)
    converted = (tensor if scale == 1 else tensor * scale).to(dtype)
    # The sum is quick. It is not finite if one of the values is not, or if they are very large.
    if not converted.sum(dtype=torch.float32).isfinite():
        if not tensor.isfinite().all():
            raise AdapterInvalidError(f"{name} has values that are NaN or infinite")
        if not converted.isfinite().all():
            raise AdapterInvalidError(f"{name}, times its scale {scale:g}, has values too large for {dtype}")
    return converted


def _rounded(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a matrix to int8. Returns it with the float32 scale of each row."""
    scales = matrix.abs().amax(-1) / 127
    return (matrix / scales.where(scales > 0, 1)[:, None]).round_().to(torch.int8), scales
