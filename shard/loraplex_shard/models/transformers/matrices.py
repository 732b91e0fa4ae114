"""The matrices of the replaced linear layers as they are computed with, read from the checkpoint again."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.models.transformers.linear import LinearInPlace
from loraplex_shard.models.transformers.tensors import ModelTensors


class LinearMatrices:
    """Implements lora.peft.base.ServedMatrices for layers that were loaded from these tensors in this form."""

    def __init__(self, linear: Iterable[LinearInPlace], tensors: ModelTensors, form: ParameterForm) -> None:
        self._layers = {part.module: (each.layer, part) for each in linear for part in each.layout.parts}
        self._tensors, self._form = tensors, form

    def has(self, module: str) -> bool:
        return module in self._layers

    def read(self, module: str, rows: slice) -> torch.Tensor:
        layer, part = self._layers[module]
        of_all_ranks = replace(layer.weight_slice(part, rows), columns=slice(None))
        return layer.as_served(self._tensors, self._form, of_all_ranks)
