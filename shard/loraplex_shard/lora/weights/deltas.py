"""What an adapter adds to the whole model's linear layers, and the part of it that one rank's layers use.

Knows neither files nor slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.sources.text_files import AdapterText
from loraplex_shard.lora.weights.arena import in_one_piece
from loraplex_shard.shapes.adapter import AdapterWeights, Expansion, LayerWeights
from loraplex_shard.shapes.layout import LinearLayout, LinearPart, count_indices


@dataclass(frozen=True, slots=True)
class Delta:
    """What becomes of one module's output: gain * output + shift + whole(x) + scale * b(a x). Of any float dtype."""

    a: torch.Tensor  # [lora_rank, in_features]
    b: torch.Tensor  # [out_features, lora_rank]
    scale: float
    gain: torch.Tensor | None = None  # [out_features]; None: 1
    shift: torch.Tensor | None = None  # [out_features]; None: 0
    whole: torch.Tensor | None = None  # [out_features, in_features], in place of the module's own where gain is 0

    @property
    def is_plain(self) -> bool:
        """Whether it is a product of A and B alone."""
        return self.gain is None and self.shift is None and self.whole is None

    @property
    def lora_rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Invocation:
    """What activates an adapter (aLoRA): it acts from the last place of these tokens in a prompt, after `lag` of
    them."""

    token_ids: tuple[int, ...]
    lag: int = 0


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter in host memory, as far as it is this rank's."""

    weights: AdapterWeights  # on the CPU
    lora_rank: int  # the largest of its modules, whether this rank holds a part of them or not
    text: AdapterText = field(default_factory=AdapterText)  # with all that ends its answers
    warnings: tuple[str, ...] = ()  # what may be wrong with it though it is served
    invocation: Invocation | None = None  # None: it is always active


def name_of_a(module: str) -> str:
    """What PEFT calls the tensor in an adapter's file."""
    return f"base_model.model.{module}.lora_A.weight"


def name_of_b(module: str) -> str:
    return f"base_model.model.{module}.lora_B.weight"


def partition_adapter(deltas: Mapping[str, Delta], layouts: Sequence[LinearLayout], dtype: torch.dtype) -> HostAdapter:
    """The deltas, by module, cut to the layouts, in this dtype, in memory of its own.

    torch.int8: A and B are rounded to it, with one scale for each of their lora_ranks. Raises AdapterInvalidError,
    naming the tensor, for values that are not finite, or not in this dtype.
    """
    layers = {}
    touched = [layout for layout in layouts if any(part.module in deltas for part in layout.parts)]
    for layout in touched:
        layers[layout.name] = _cut(layout, deltas, dtype)
    # A table has the experts' rows, thousands of them, only where it has a use for them.
    of_experts = any(layout.of_expert for layout in touched)
    held = [layout for layout in layouts if of_experts or not layout.of_expert]
    return HostAdapter(in_one_piece(layers, count_indices(held)), max(delta.lora_rank for delta in deltas.values()))


def _cut(layout: LinearLayout, deltas: Mapping[str, Delta], dtype: torch.dtype) -> LayerWeights:
    """This rank's part of one layer's delta, of at least one of its parts."""
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
    """This rank's A [lora_rank, columns], and B [lora_rank, outputs] times the scale. A whole matrix is a B, too, whose
    A leaves the input as it is."""
    a = _converted(name_of_a(part.module), delta.a, 1.0, dtype)[:, layout.columns]
    b = _converted(name_of_b(part.module), delta.b, delta.scale, dtype)
    if delta.whole is not None:
        whole = _converted(f"{part.module}.weight", delta.whole, 1.0, dtype)[:, layout.columns]
        a, b = torch.cat((torch.eye(whole.shape[1], dtype=dtype), a)), torch.cat((whole, b), dim=1)
    return a, torch.cat([b[run] for run in part.rows]).T.contiguous()


def _affine(layout: LinearLayout, part: LinearPart, delta: Delta) -> torch.Tensor | None:
    """The factors and shifts of this rank's outputs. Of ranks whose outputs are summed, the first one shifts them."""
    if delta.gain is None and delta.shift is None:
        return None
    ones = torch.ones(part.out_features)
    gain = ones if delta.gain is None else delta.gain
    shift = ones * 0 if delta.shift is None or layout.columns.start else delta.shift
    affine = torch.stack((gain.float(), shift.float()))
    if not affine.isfinite().all():
        raise AdapterInvalidError(f"what the adapter does to outputs of {part.module} is NaN or infinite")
    return torch.cat([affine[:, run] for run in part.rows], dim=1)


def _converted(name: str, tensor: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The tensor times the scale, computed in float32 and rounded once."""
    tensor = tensor.to(torch.float32)
    if not tensor.isfinite().all():
        raise AdapterInvalidError(f"{name} has values that are NaN or infinite")
    converted = (tensor * scale).to(dtype)
    if not converted.isfinite().all():
        raise AdapterInvalidError(f"{name}, times its scale {scale:g}, has values too large for {dtype}")
    return converted


def _rounded(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as int8, and the scale of each of its rows, float32."""
    scales = matrix.abs().amax(-1) / 127
    return (matrix / scales.where(scales > 0, 1)[:, None]).round_().to(torch.int8), scales
