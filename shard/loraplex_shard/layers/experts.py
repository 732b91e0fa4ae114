"""A linear layer of each expert of a mixture."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import nn

from loraplex_shard.layers.linear import Linear
from loraplex_shard.ops.base import Operations, Routing, Step, Weight
from loraplex_shard.shapes.layout import LinearLayout


class ExpertsLinear(nn.Module):
    """Reads the inputs of all pairs of a token and one of its experts, in the order of the experts."""

    def __init__(self, layouts: Sequence[LinearLayout], ops: Operations) -> None:
        """`layouts`: of each expert; their indices follow each other."""
        super().__init__()
        self.ops, self.layouts = ops, tuple(layouts)
        self.experts = nn.ModuleList(Linear(layout, bias=False, ops=ops) for layout in layouts)

    def forward(self, x: torch.Tensor, step: Step, routing: Routing) -> torch.Tensor:
        """x [pairs, in_features] -> [pairs, this rank's outputs]."""
        out = self.ops.expert_linear(x, routing, self._weight)
        self.ops.add_expert_lora_delta(out, x, step, routing, self.layouts)
        return out

    @cached_property
    def _weight(self) -> Weight:
        """Of all experts; they have their own once they are loaded."""
        experts = [expert for expert in self.experts if isinstance(expert, Linear)]
        return self.ops.stack([expert.weight for expert in experts], [expert.bias for expert in experts])
