"""Fused experts in transformers' code. Ours compute them, as far as their code has the usual form, so that they are
quantized and take adapters; transformers' own compute the others. Both are found under our name, so that a model can
also run on tensors without values."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from loraplex_shard.layers.experts import ExpertLinear, ExpertsLinear, ExpertsTensor
from loraplex_shard.layers.parameters import ParameterForm, TensorReader
from loraplex_shard.models.transformers.attention import IMPLEMENTATION
from loraplex_shard.models.transformers.linear import ForwardContext
from loraplex_shard.ops.base import Operations, Routing
from loraplex_shard.shapes.layout import LinearLayout, LinearPart

GATE_UP, DOWN = "gate_up_proj", "down_proj"


class ExpertsInPlace(nn.Module):
    """Our experts, inside of transformers' module, which still chooses their activation."""

    def __init__(
        self, name: str, module: Any, units: slice, index: int, ops: Operations, context: ForwardContext
    ) -> None:
        """`name` is that of transformers' module. `units` are this rank's part of each expert's intermediate units.
        `index` is that of the first layout."""
        super().__init__()
        self.ops, self.context = ops, context
        self.count, rows, hidden = module.gate_up_proj.shape
        size, whole = rows // 2, slice(0, hidden)

        def part(number: int, leaf: str, outputs: int, run: slice) -> LinearPart:
            return LinearPart(f"{name}.{number}.{leaf}", outputs, (run,))

        def layout(kind: str, place: int, parts: tuple[LinearPart, ...], inputs: int, columns: slice) -> LinearLayout:
            return LinearLayout(f"{name}.{kind}", index + place, parts, inputs, columns, of_expert=True)

        gate_up, down = [], []
        for each in range(self.count):
            gates, ups = part(each, "gate_proj", size, units), part(each, "up_proj", size, units)
            gate_up.append(layout(f"gate_up.{each}", each, (gates, ups), hidden, whole))
            down.append(layout(f"down.{each}", self.count + each, (part(each, DOWN, hidden, whole),), size, units))
        self.gate_up = ExpertsLinear(gate_up, ExpertsTensor(f"{name}.{GATE_UP}"), False, ops)
        self.down = ExpertsLinear(down, ExpertsTensor(f"{name}.{DOWN}"), False, ops)

    @property
    def layouts(self) -> tuple[LinearLayout, ...]:
        return self.gate_up.layouts + self.down.layouts

    def load(self, reader: TensorReader, form: ParameterForm) -> Iterator[str]:
        """Loads all experts. Yields each tensor's name."""
        for experts in (self.gate_up, self.down):
            tensors: set[str] = set()
            for expert in experts.experts:
                assert isinstance(expert, ExpertLinear)
                expert.choose_slices(reader)
                tensors.update(expert.load(reader, form))
            yield from tensors

    def compute(self, module: Any, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [tokens, n], and for each token its experts and their weights [tokens, chosen] -> [tokens, n]."""
        routing = _routing(experts, weights, self.count)
        gate_up = self.gate_up(self.ops.dispatch(hidden.contiguous(), routing), self.context.step, routing)
        active: torch.Tensor = module._apply_gate(gate_up)
        return self.ops.combine(self.down(active.contiguous(), self.context.step, routing), routing)


def are_usual(module: nn.Module) -> bool:
    """Whether the experts are matrices of gates and ups, one after the other, and of downs, and nothing else."""
    unusual = {"is_transposed": True, "has_bias": True, "has_post_expert_norm": True, "has_gate": False}
    return getattr(module, "is_concatenated", False) and all(
        getattr(module, name, value) is not value for name, value in unusual.items()
    )


def _routing(experts: torch.Tensor, weights: torch.Tensor, count: int) -> Routing:
    pairs = experts.reshape(-1)
    order = pairs.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    starts = torch.zeros(count + 1, dtype=torch.int64, device=order.device)
    starts[1:] = pairs.bincount(minlength=count).cumsum(0)
    return Routing(weights.reshape(-1).float(), order, places, starts, experts.shape[1])


def _experts(module: Any, hidden: torch.Tensor, *routing: Any) -> torch.Tensor:
    if hidden.is_meta:
        return torch.empty_like(hidden)
    ours = getattr(module, "ours", None)
    if isinstance(ours, ExpertsInPlace):
        return ours.compute(module, hidden, *routing)
    out: torch.Tensor = grouped_mm_experts_forward(module, hidden, *routing)
    return out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
