"""Our linear layers and embedding in the places of transformers'. They take what modeling code hands them, tensors of
any leading dimensions, and know which step is computed."""

from dataclasses import dataclass

import torch
from torch import nn

from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.embedding import Embedding
from loraplex_shard.layers.linear import ColumnLinear, RowLinear
from loraplex_shard.ops.base import Segments, Step
from loraplex_shard.shapes.layout import LinearLayout


@dataclass
class Now:
    """What the layers are told of the forward pass that they are in."""

    device: torch.device
    step: Step = None
    segments: Step | Segments = ()


class OnRankZeroAlone(Exception):
    """Ends the forward pass of a rank that has no part in what follows."""


class InPlace(nn.Module):
    """Where one of transformers' modules was."""

    def __init__(self, layer: ColumnLinear | RowLinear | Embedding, dtype: torch.dtype, now: Now) -> None:
        super().__init__()
        self.layer, self.dtype, self.now = layer, dtype, now

    @property
    def weight(self) -> torch.Tensor:
        """Modeling code asks for its dtype and its device."""
        return torch.empty(0, dtype=self.dtype, device=self.now.device)

    def tie(self, other: "InPlace") -> None:
        """Takes the other's matrix, or its own rows of it, without a copy."""
        assert isinstance(self.layer, ColumnLinear)
        self.layer.tie(other.layer.weight)


class EmbeddingInPlace(InPlace):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.is_meta:
            return torch.empty((*ids.shape, self.layer.matrix_shape[1]), dtype=self.dtype, device="meta")
        out: torch.Tensor = self.layer(self.now.step, self.dtype)
        return out.view(*ids.shape, -1)


class LinearInPlace(InPlace):
    layer: ColumnLinear | RowLinear

    def __init__(self, layer: ColumnLinear | RowLinear, dtype: torch.dtype, now: Now, adaptable: bool) -> None:
        super().__init__(layer, dtype, now)
        self.adaptable = adaptable
        self.in_features, self.out_features = self.layout.in_features, self.layout.parts[0].out_features

    @property
    def layout(self) -> LinearLayout:
        return self.layer.layout

    @property
    def width(self) -> int:
        """Outputs on this rank."""
        return self.layout.parts[0].width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_meta:
            return x.new_empty((*x.shape[:-1], self.width))
        return self.compute(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(rows.contiguous(), self.now.segments if self.adaptable else ())
        return out


class SplitLinear(LinearInPlace):
    """Row-parallel, but every rank has the inputs of all."""

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        return super().compute(rows[:, self.layout.columns])


class GatheredLinear(LinearInPlace):
    """Column-parallel, but every rank has the outputs of all."""

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
    """The lm head: rank 0 alone goes on with the outputs of all."""

    widths: list[int]  # of the ranks' outputs

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        gathered = self.group.gather(LinearInPlace.compute(self, rows), self.widths)
        if gathered is None:
            raise OnRankZeroAlone
        return gathered
