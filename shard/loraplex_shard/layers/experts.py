"""The linear layers of a mixture's experts, computed together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from loraplex_shard.layers.linear import Linear
from loraplex_shard.layers.parameters import TensorSlice
from loraplex_shard.ops.base import Operations, Routing, Step, Weight
from loraplex_shard.shapes.layout import LinearLayout, LinearPart


@dataclass(frozen=True, slots=True)
class ExpertsTensor:
    """The name of the tensor with all experts' matrices, for checkpoints that do not have a tensor for each expert."""

    weight: str
    bias: str = ""  # [experts, out_features]; empty: there is no bias
    transposed: bool | None = False  # the weight is [experts, in_features, out_features]; None: either way


class ExpertLinear(Linear):
    """The linear layer of one expert. It has parameters, but is never computed by itself."""

    def __init__(self, layout: LinearLayout, number: int, count: int, tensor: ExpertsTensor, ops: Operations) -> None:
        """Expert `number` of `count`."""
        self.number, self.count, self.tensor = number, count, tensor
        super().__init__(layout, bool(tensor.bias), ops)

    def weight_slice(self, part: LinearPart, run: slice) -> TensorSlice:
        rows, columns = sum(each.out_features for each in self.layout.parts), self.layout.in_features
        of_all = TensorSlice(
            self.tensor.weight,
            (self.count, rows, columns),
            self._shifted(part, run),
            self.layout.columns,
            expert=self.number,
        )
        if self.tensor.transposed is not False:
            other = replace(of_all, shape=(self.count, columns, rows), transposed=True)
            of_all = other if self.tensor.transposed else replace(of_all, instead=other)
        return replace(super().weight_slice(part, run), instead=of_all)

    def bias_slice(self, part: LinearPart, run: slice) -> TensorSlice:
        rows = sum(each.out_features for each in self.layout.parts)
        return TensorSlice(self.tensor.bias, (self.count, rows), self._shifted(part, run), expert=self.number)

    def _shifted(self, part: LinearPart, run: slice) -> slice:
        """Converts rows of a part to rows of the tensor of all parts."""
        before = sum(each.out_features for each in self.layout.parts[: self.layout.parts.index(part)])
        return slice(before + run.start, before + run.stop, run.step)


class ExpertsLinear(nn.Module):
    """The linear layers of all experts. Inputs are pairs of a token and one of its experts, in the order of the
    experts.
    """

    def __init__(
        self, layouts: Sequence[LinearLayout], tensor: ExpertsTensor, adds_bias: bool, ops: Operations
    ) -> None:
        """`layouts` has one layout for each expert, with consecutive indices. If there is a bias, this rank adds it if
        `adds_bias`."""
        super().__init__()
        self.ops, self.layouts, self.adds_bias = ops, tuple(layouts), adds_bias
        self.experts = nn.ModuleList(
            ExpertLinear(layout, number, len(layouts), tensor, ops) for number, layout in enumerate(layouts)
        )

    def forward(self, x: torch.Tensor, step: Step, routing: Routing) -> torch.Tensor:
        """x [pairs, in_features] -> [pairs, this rank's outputs]."""
        out = self.ops.expert_linear(x, routing, self._weight)
        self.ops.add_expert_lora_delta(out, x, step, routing, self.layouts)
        return out

    @cached_property
    def _weight(self) -> Weight:
        """The weights of all experts, stacked when they are first needed, after loading."""
        experts = [expert for expert in self.experts if isinstance(expert, Linear)]
        biases = [expert.bias if self.adds_bias else None for expert in experts]
        return self.ops.stack([expert.weight for expert in experts], biases)
