"""The part of a decoder's layer that follows attention: an MLP, or a mixture of experts."""

from dataclasses import replace

import torch
from torch import nn

from loraplex_shard.layers.experts import ExpertsLinear, ExpertsTensor
from loraplex_shard.layers.linear import ColumnLinear, RowLinear
from loraplex_shard.layers.parameters import FLOAT
from loraplex_shard.models.build import Build
from loraplex_shard.ops.base import Step


class Mlp(nn.Module):
    def __init__(self, index: int, build: Build) -> None:
        super().__init__()
        self.spec, self.ops = build.spec, build.ops
        self.gate_up = ColumnLinear(build.partition.gate_up(index), self.spec.mlp_bias, self.ops)
        self.down = RowLinear(build.partition.down(index), self.spec.mlp_bias, self.ops, build.group)

    def forward(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        out: torch.Tensor = self.down(self._active(hidden, step), step)
        return out

    def partial(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        """This rank's summand of the MLP's output."""
        return self.down.partial(self._active(hidden, step), step)

    def _active(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        return self.ops.activate(self.gate_up(hidden, step), self.spec.activation, self.spec.gated)


class MixtureOfExperts(nn.Module):
    """A router and experts. Every rank has a part of each expert, cut by units like an MLP. So all ranks have the same
    amount of work for any choice of experts, and one sum over the ranks is enough, as for an MLP."""

    def __init__(self, index: int, build: Build) -> None:
        super().__init__()
        assert build.spec.experts is not None
        self.spec, self.experts, self.ops, self.group = build.spec, build.spec.experts, build.ops, build.group
        partition = build.partition
        experts, bias = self.experts, self.experts.router_bias
        self.router = ColumnLinear(partition.router(index), bias, self.ops, least_bits=FLOAT)
        gate_up, down = (
            _below(build.spec.names.layer(index), each) for each in (experts.gate_up_tensor, experts.down_tensor)
        )
        self.gate_up = ExpertsLinear(partition.experts_gate_up(index), gate_up, True, self.ops)
        self.down = ExpertsLinear(partition.experts_down(index), down, self.group.rank == 0, self.ops)
        self.shared: Mlp | None = None
        self.shared_gate: ColumnLinear | None = None
        if experts.shared_size:
            self.shared = Mlp(index, build)
            if experts.shared_gate:
                self.shared_gate = ColumnLinear(partition.shared_gate(index), False, self.ops, least_bits=FLOAT)

    def forward(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        routing = self.ops.route(self.router(hidden, step), self.experts.chosen, self.experts.normalized)
        gate_up = self.gate_up(self.ops.dispatch(hidden, routing), step, routing)
        active = self.ops.activate(gate_up, self.spec.activation, self.spec.gated)
        outputs = self.down(active, step, routing)
        shared, gate = None, None
        if self.shared is not None:
            shared = self.shared.partial(hidden, step)
        if self.shared_gate is not None:
            gate = self.shared_gate(hidden, step)
        out = self.ops.combine(outputs, routing, shared, gate)
        self.ops.all_reduce_(out, self.group)
        return out


def _below(layer: str, tensor: ExpertsTensor) -> ExpertsTensor:
    bias = tensor.bias and f"{layer}.{tensor.bias}"
    return replace(tensor, weight=f"{layer}.{tensor.weight}", bias=bias)
