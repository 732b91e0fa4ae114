"""An adapter's weights as the layers use them: cut for this rank, stacked by layer, with the scale folded into B."""

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, replace
from itertools import count

import torch

from loraplex_shard.device.memory import view_at
from loraplex_shard.kernels.tables import places, row, width
from loraplex_shard.shapes.classifier import Classifier
from loraplex_shard.shapes.own_weights import NOTHING, OwnWeights, tensors_of


@dataclass(frozen=True, slots=True)
class Expansion:
    """What is done to the outputs of one projection, [start, stop). If there is an `affine`, they are multiplied and
    shifted first. Then B's product with columns [rank_start, rank_stop) of the shrunk input is added."""

    rank_start: int
    rank_stop: int
    start: int  # within the fused layer's output on this rank
    stop: int
    weight: torch.Tensor  # [lora_rank, stop - start], times the adapter's scale; lora_rank may be 0
    affine: torch.Tensor | None = None  # [2, stop - start] float32: factors and shifts for the base's outputs


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """An adapter's delta to a (fused) linear layer. The A matrices of its projections are stacked, since they share
    x."""

    index: int  # the layer's LinearLayout.index
    shrink: torch.Tensor  # [sum of the projections' lora_ranks, in_features on this rank]
    expansions: tuple[Expansion, ...]
    scales: torch.Tensor | None = None  # [sum of the lora_ranks] float32: scales for A and B together, if int8

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LayerWeights":
        """Returns a copy with the function applied to each tensor, in the order in which a step reads them."""
        return replace(
            self,
            shrink=function(self.shrink),
            expansions=tuple(
                replace(e, affine=None if e.affine is None else function(e.affine), weight=function(e.weight))
                for e in self.expansions
            ),
            scales=None if self.scales is None else function(self.scales),
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        return tensors_of(self.map)


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter on a device. Layers that it does not touch are absent. Its tensors never move."""

    layers: Mapping[str, LayerWeights]  # by LinearLayout.name
    layer_count: int  # linear layers of the model on this rank
    memory: torch.Tensor  # [bytes] uint8: all tensors are views of it
    classifier: Classifier | None = None  # replaces the model's
    own: OwnWeights = NOTHING  # outside the linear layers
    known_table: InitVar[torch.Tensor | None] = None  # if the table need not be made
    table: torch.Tensor = field(init=False)  # [layer_count, numbers of a LoraLayer] int64: read by kernels
    widest: int = field(init=False)  # the largest sum of lora_ranks in one layer
    int8: bool = field(init=False)  # whether A and B are int8
    size_bytes: int = field(init=False)  # of its memory and its table
    serial: int = field(init=False, default_factory=count().__next__)  # no other has it, also after this one is gone

    def __post_init__(self, known_table: torch.Tensor | None) -> None:
        layers = self.layers.values()
        table = _table(self.layers, self.layer_count) if known_table is None else known_table
        object.__setattr__(self, "table", table.to(self.memory.device))
        object.__setattr__(self, "int8", any(layer.scales is not None for layer in layers))
        object.__setattr__(self, "widest", max((len(layer.shrink) for layer in layers), default=0))
        object.__setattr__(self, "size_bytes", self.memory.nbytes + self.table.nbytes)

    def at(self, memory: torch.Tensor) -> "AdapterWeights":
        """Returns the same adapter in a copy of its memory, which may be on another device."""
        start = self.memory.data_ptr()

        def view(tensor: torch.Tensor) -> torch.Tensor:
            return view_at(memory, tensor.data_ptr() - start if tensor.nbytes else 0, tensor.dtype, tensor.shape)

        layers = {name: layer.map(view) for name, layer in self.layers.items()}
        classifier = None if self.classifier is None else self.classifier.map(view)
        table = moved(self.table, memory.data_ptr() - start)
        return AdapterWeights(layers, self.layer_count, memory, classifier, self.own.map(view), table)


def _table(layers: Mapping[str, LayerWeights], layer_count: int) -> torch.Tensor:
    """A LoraLayer (see kernels/csrc/tables.h) for each layer of the model. Layers that the adapter does not touch are
    zeros."""
    table = torch.zeros((layer_count, width("LoraLayer")), dtype=torch.int64)
    for layer in layers.values():
        parts = [number for expansion in layer.expansions for number in _part(expansion)]
        numbers = row(
            "LoraLayer",
            lora_rank=len(layer.shrink),
            parts=len(layer.expansions),
            shrink=layer.shrink.data_ptr(),
            scales=0 if layer.scales is None else layer.scales.data_ptr(),
            part=parts,
        )
        table[layer.index] = torch.tensor(numbers)
    return table


def moved(table: torch.Tensor, distance: int) -> torch.Tensor:
    """A table whose adapter's memory is elsewhere, by so many bytes."""
    layer, part = places("LoraLayer"), places("LoraPart")
    parts = range(layer["part"], width("LoraLayer"), width("LoraPart"))
    columns = [layer["shrink"], layer["scales"], *(at + part[name] for at in parts for name in ("expand", "affine"))]
    table = table.clone()
    table[:, columns] += (table[:, columns] != 0) * distance
    return table


def _part(expansion: Expansion) -> list[int]:
    return row(
        "LoraPart",
        rank_start=expansion.rank_start,
        rank_stop=expansion.rank_stop,
        start=expansion.start,
        stop=expansion.stop,
        expand=expansion.weight.data_ptr(),
        affine=0 if expansion.affine is None else expansion.affine.data_ptr(),
    )
