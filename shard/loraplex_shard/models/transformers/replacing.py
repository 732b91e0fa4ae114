"""Replaces transformers' layers by ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.embedding import Embedding
from loraplex_shard.layers.linear import ColumnLinear, RowLinear
from loraplex_shard.models.transformers.experts import DOWN, GATE_UP, ExpertsInPlace, are_usual
from loraplex_shard.models.transformers.linear import (
    EmbeddingInPlace,
    ForwardContext,
    GatheredHead,
    GatheredLinear,
    LinearInPlace,
    SplitLinear,
)
from loraplex_shard.models.transformers.parallel_rules import (
    COLUMN,
    GATHERED,
    ROW,
    SHARED,
    SPLIT,
    SUMMED,
    UNCUT,
    ParallelRules,
)
from loraplex_shard.models.transformers.traits import ModelTraits
from loraplex_shard.ops.base import Operations
from loraplex_shard.shapes.layout import LinearLayout, LinearPart


@dataclass(frozen=True, slots=True)
class Replacement:
    """What the replaced layers are made with. Their parameters are loaded later."""

    traits: ModelTraits
    rules: ParallelRules
    group: Group
    ops: Operations
    context: ForwardContext
    dtypes: Mapping[str, torch.dtype]  # of all tensors

    def apply(self, model: PreTrainedModel) -> None:
        """Replaces the embedding and the linear layers, which are cut by the rules."""
        size, index = self.group.size, 0
        for name, module in list(model.named_modules()):
            if name in self.traits.linear:
                layer = self._linear(name, module, index, name == self.traits.head)
                layer.is_head = name == self.traits.head and isinstance(layer.layer, ColumnLinear)
                model.set_submodule(name, layer)
                index += layer.adaptable
            elif type(module) is nn.Embedding and name == self.traits.embedding:
                embedding = Embedding(f"{name}.weight", module.num_embeddings, module.embedding_dim, 1.0, self.ops)
                model.set_submodule(name, EmbeddingInPlace(embedding, self.dtypes[f"{name}.weight"], self.context))
            elif self.rules.style(name) in SUMMED:
                module.register_forward_hook(self._sum)
            elif self.rules.style(name) in SHARED:
                module.register_forward_pre_hook(lambda module, inputs: (inputs[0] / size, *inputs[1:]))
        self._replace_experts(model, index)

    def _replace_experts(self, model: PreTrainedModel, index: int) -> None:
        """Puts ours into transformers' modules. Their layouts come behind all others, from `index` on."""
        for name, module in list(model.named_modules()):
            if not are_usual(module) or self.dtypes[f"{name}.{GATE_UP}"] != self._dtype:
                continue
            experts: Any = module
            size = experts.gate_up_proj.shape[1] // 2
            cut = self.rules.style(f"{name}.{GATE_UP}") not in UNCUT
            units = self.rules.parts(name, size)[self.group.rank] if cut else slice(0, size)
            experts.ours = ExpertsInPlace(name, module, units, index, self.ops, self.context)
            for parameter in (GATE_UP, DOWN):
                del module._parameters[parameter]
            index += len(experts.ours.layouts)

    @property
    def _dtype(self) -> torch.dtype:
        """The hidden states'."""
        return self.dtypes[f"{self.traits.embedding}.weight"]

    def _linear(self, name: str, module: Any, index: int, is_head: bool) -> LinearInPlace:
        conv = isinstance(module, Conv1D)
        in_features, out_features = (module.nx, module.nf) if conv else (module.in_features, module.out_features)
        style, rows, columns = self.rules.style(name), slice(0, out_features), slice(0, in_features)
        if style in COLUMN:
            rows = self.rules.parts(name, out_features)[self.group.rank]
        if style in ROW:
            columns = self.rules.parts(name, in_features)[self.group.rank]
        dtype = self.dtypes[f"{name}.weight"]
        adaptable = self.traits.linear[name] and dtype == self._dtype
        part = LinearPart(name, out_features, (rows,))
        layout = LinearLayout(name, index if adaptable else 0, (part,), in_features, columns)
        if style in ROW:
            row = RowLinear(layout, module.bias is not None, self.ops, self.group)
            return (SplitLinear if style in SPLIT else LinearInPlace)(row, dtype, self.context, adaptable)
        column = ColumnLinear(layout, module.bias is not None, self.ops, least_bits=8 if is_head else 4)
        if style not in GATHERED:
            return LinearInPlace(column, dtype, self.context, adaptable)
        gathered = (GatheredHead if is_head else GatheredLinear)(column, dtype, self.context, adaptable)
        gathered.group = self.group
        if isinstance(gathered, GatheredHead):
            gathered.widths = [each.stop - each.start for each in self.rules.parts(name, out_features)]
        return gathered

    def _sum(self, module: nn.Module, inputs: object, out: torch.Tensor) -> torch.Tensor:
        if not out.is_meta:
            self.group.all_reduce_(out)
        return out
