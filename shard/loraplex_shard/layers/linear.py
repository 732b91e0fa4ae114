"""Linear layers that know how they were cut over the ranks and that adapters add to them."""

import torch
import torch.nn.functional as F
from torch import nn

from loraplex_shard.batch import Segment
from loraplex_shard.layers.layout import LinearLayout
from loraplex_shard.layers.sources import Source, SourcedLayer
from loraplex_shard.ops.lora import add_lora_delta
from loraplex_shard.parallel import Group


class _Linear(SourcedLayer):
    weight: nn.Parameter  # [rows of all parts, columns]
    bias: nn.Parameter | None

    def __init__(self, layout: LinearLayout, bias: bool) -> None:
        super().__init__()
        self.layout = layout
        parts, columns = layout.parts, layout.columns
        rows = sum(part.rows.stop - part.rows.start for part in parts)
        self.declare(
            "weight",
            (rows, columns.stop - columns.start),
            *(Source(f"{p.module}.weight", (p.out_features, layout.in_features), p.rows, columns) for p in parts),
        )
        self.register_parameter("bias", None)
        if bias:
            self.declare("bias", (rows,), *(Source(f"{p.module}.bias", (p.out_features,), p.rows) for p in parts))


class ColumnLinear(_Linear):
    """Column-parallel: reads the whole input, computes this rank's rows of each part."""

    def forward(self, x: torch.Tensor, segments: tuple[Segment, ...]) -> torch.Tensor:
        """x [tokens, in_features] -> [tokens, this rank's outputs of all parts, side by side]."""
        out = F.linear(x, self.weight, self.bias)
        if segments:
            add_lora_delta(out, x, segments, self.layout.name)
        return out

    def tie(self, weight: torch.Tensor) -> None:
        """Takes its rows of `weight` [out_features, in_features] as its own: a view, not a copy."""
        (part,) = self.layout.parts
        self.weight = nn.Parameter(weight[part.rows], requires_grad=False)


class RowLinear(_Linear):
    """Row-parallel: reads this rank's columns of the input, and sums the ranks' partial outputs."""

    def __init__(self, layout: LinearLayout, bias: bool, group: Group) -> None:
        super().__init__(layout, bias)
        self.group = group

    def forward(self, x: torch.Tensor, segments: tuple[Segment, ...]) -> torch.Tensor:
        """x [tokens, this rank's inputs] -> [tokens, out_features], the same on all ranks."""
        out = F.linear(x, self.weight)
        if segments:
            add_lora_delta(out, x, segments, self.layout.name)
        self.group.all_reduce_(out)
        return out if self.bias is None else out.add_(self.bias)
