"""Linear layers. They know how they are cut for the ranks, and that adapters add to them."""

from dataclasses import replace

import torch
from torch import nn

from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import LoadableLayer, TensorSlice
from loraplex_shard.ops.base import Operations, Segments, Step, Weight
from loraplex_shard.shapes.layout import LinearLayout, LinearPart

# transformers renames this part of names in some checkpoints when it loads them.
BLOCK, RENAMED = ".block_sparse_moe.", ".mlp."


class Linear(LoadableLayer):
    """A weight, and maybe a bias, cut according to its layout."""

    bias: nn.Parameter | None

    def __init__(self, layout: LinearLayout, bias: bool, ops: Operations, least_bits: int = 4) -> None:
        super().__init__(ops)
        self.layout = layout
        parts, columns = layout.parts, layout.columns
        rows = sum(part.width for part in parts)
        self.declare_matrix(
            (rows, columns.stop - columns.start),
            *(self.weight_slice(part, run) for part in parts for run in part.rows),
            least_bits=least_bits,
        )
        self.register_parameter("bias", None)
        if bias:
            self.declare("bias", (rows,), *(self.bias_slice(part, run) for part in parts for run in part.rows))

    def weight_slice(self, part: LinearPart, run: slice) -> TensorSlice:
        """Where these rows of a part come from."""
        shape = part.out_features, self.layout.in_features
        tensor_slice = TensorSlice(f"{part.module}.weight", shape, run, self.layout.columns)
        renamed = replace(tensor_slice, tensor=tensor_slice.tensor.replace(BLOCK, RENAMED))
        return tensor_slice if renamed == tensor_slice else replace(tensor_slice, instead=renamed)

    def bias_slice(self, part: LinearPart, run: slice) -> TensorSlice:
        return TensorSlice(f"{part.module}.bias", (part.out_features,), run)


class ColumnLinear(Linear):
    """A column-parallel layer: it reads the whole input and computes this rank's rows of each part."""

    def forward(self, x: torch.Tensor, segments: Step | Segments) -> torch.Tensor:
        """x [tokens, in_features] -> [tokens, this rank's outputs of all parts, side by side]."""
        out = self.ops.linear(x, self.weight, self.bias)
        self.ops.add_lora_delta(out, x, segments, self.layout)
        return out

    def tie(self, weight: Weight) -> None:
        """Uses this rank's rows of `weight` [out_features, in_features] without a copy."""
        (part,) = self.layout.parts
        (rows,) = part.rows
        self.weight = weight.part(rows)


class RowLinear(Linear):
    """A row-parallel layer: it reads this rank's columns of the input, and the ranks' partial outputs are summed."""

    def __init__(self, layout: LinearLayout, bias: bool, ops: Operations, group: Group) -> None:
        super().__init__(layout, bias, ops)
        self.group = group

    def forward(self, x: torch.Tensor, segments: Step | Segments) -> torch.Tensor:
        """x [tokens, this rank's inputs] -> [tokens, out_features], the same on all ranks."""
        out = self.partial(x, segments)
        self.ops.all_reduce_(out, self.group)
        return out

    def partial(self, x: torch.Tensor, segments: Step | Segments) -> torch.Tensor:
        """This rank's summand of the output."""
        out = self.ops.linear(x, self.weight, self.bias if self.group.rank == 0 else None)
        self.ops.add_lora_delta(out, x, segments, self.layout)
        return out
