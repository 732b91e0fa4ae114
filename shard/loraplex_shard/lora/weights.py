"""An adapter's weights as the layers use them: cut for this rank, stacked by layer, scale folded into B."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Expansion:
    """B of one projection: takes columns [rank_start, rank_stop) of the shrunk input to outputs [start, stop)."""

    rank_start: int
    rank_stop: int
    start: int  # in the fused layer's output on this rank
    stop: int
    weight: torch.Tensor  # [stop - start, lora_rank], times the adapter's scale


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One adapter's delta to one (fused) linear layer: A of the projections stacked, since they share x."""

    shrink: torch.Tensor  # [sum of the projections' lora_ranks, in_features on this rank]
    expansions: tuple[Expansion, ...]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """One adapter on one device. Layers that it does not touch are absent."""

    layers: Mapping[str, LayerWeights]  # by LinearLayout.name
    size_bytes: int
