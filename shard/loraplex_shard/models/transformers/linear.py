"""Modules that replace transformers' linear layers and embedding by ours. They take tensors with any leading
dimensions, as modeling code passes them, and know the current step."""

from dataclasses import dataclass

import torch
from torch import nn

from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.embedding import Embedding
from loraplex_shard.layers.linear import ColumnLinear, RowLinear
from loraplex_shard.layers.own_head import put_own_logits
from loraplex_shard.ops.base import Segments, Step
from loraplex_shard.shapes.layout import LinearLayout


@dataclass
class ForwardContext:
    """What the replaced layers need to know about the current forward pass."""

    device: torch.device
    step: Step = None
    segments: Step | Segments = ()


class OnRankZeroAlone(Exception):
    """Ends the forward pass on a rank that does not take part in the rest of it."""


class InPlace(nn.Module):
    """A module in the place of one of transformers' modules."""

    def __init__(
        self, layer: ColumnLinear | RowLinear | Embedding, dtype: torch.dtype, context: ForwardContext
    ) -> None:
        super().__init__()
        self.layer, self.dtype, self.context = layer, dtype, context

    @property
    def weight(self) -> torch.Tensor:
        """An empty tensor: modeling code only asks for the weight's dtype and device."""
        return torch.empty(0, dtype=self.dtype, device=self.context.device)

    def tie(self, other: "InPlace") -> None:
        """Uses the other's matrix, or this rank's rows of it, without a copy."""
        assert isinstance(self.layer, ColumnLinear)
        self.layer.tie(other.layer.weight)


class EmbeddingInPlace(InPlace):
    layer: Embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.is_meta:
            return torch.empty((*ids.shape, self.layer.matrix_shape[1]), dtype=self.dtype, device="meta")
        out: torch.Tensor = self.layer(self.context.step, self.dtype)
        return out.view(*ids.shape, -1)


class LinearInPlace(InPlace):
    layer: ColumnLinear | RowLinear

    def __init__(
        self, layer: ColumnLinear | RowLinear, dtype: torch.dtype, context: ForwardContext, adaptable: bool
    ) -> None:
        super().__init__(layer, dtype, context)
        self.adaptable, self.is_head = adaptable, False
        self.in_features, self.out_features = self.layout.in_features, self.layout.parts[0].out_features

    @property
    def layout(self) -> LinearLayout:
        return self.layer.layout

    @property
    def width(self) -> int:
        """The number of outputs on this rank."""
        return self.layout.parts[0].width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_meta:
            return x.new_empty((*x.shape[:-1], self.width))
        return self.compute(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        rows, segments = rows.contiguous(), self.context.segments if self.adaptable else ()
        out: torch.Tensor = self.layer(rows, segments)
        if self.is_head and isinstance(segments, tuple):
            put_own_logits(self.layer.ops, out, rows, segments)
        return out


class SplitLinear(LinearInPlace):
    """A row-parallel layer, but every rank gets all inputs."""

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        return super().compute(rows[:, self.layout.columns])


class GatheredLinear(LinearInPlace):
    """A column-parallel layer, but every rank returns all outputs."""

    group: Group

    @property
    def width(self) -> int:
        return self.out_features

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        out = rows.new_zeros((len(rows), self.out_features))
        (own,) = self.layout.parts[0].rows
        out[:, own] = super().compute(rows)
        self.group.all_reduce_(out)
        return out


class GatheredHead(GatheredLinear):
    """The lm head. Only rank 0 gets all outputs and continues."""

    widths: list[int]  # the number of outputs of each rank

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        gathered = self.group.gather(LinearInPlace.compute(self, rows), self.widths)
        if gathered is None:
            raise OnRankZeroAlone
        return gathered
