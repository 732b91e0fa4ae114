"""The weights of the replaced layers as they are computed with, read from the checkpoint again."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from loraplex_shard.layers.embedding import Embedding
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.models.transformers.linear import LinearInPlace
from loraplex_shard.models.transformers.tensors import ModelTensors
from loraplex_shard.ops.base import Weight
from loraplex_shard.shapes.layout import VocabularyLayout


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


class ServedWeights:
    """Implements lora.peft.base.ServedWeights for a model whose embedding is ours, too. Its norms are transformers'."""

    resizable = False
    norms: Mapping[str, tuple[int, ...]] = {}

    def __init__(
        self,
        matrices: LinearMatrices,
        embedding: Embedding,
        tensors: ModelTensors,
        form: ParameterForm,
        head: str,
        tied: bool,
    ) -> None:
        """`tied`: whether the lm head, `head`, is the embedding."""
        self._matrices, self._embedding, self._tensors, self._form, self.tied = matrices, embedding, tensors, form, tied
        self.transposed = tensors.transposed
        (whole,) = embedding.matrix
        name, sizes = whole.tensor.removesuffix(".weight"), embedding.matrix_shape
        self.vocabulary = VocabularyLayout(name, head, *sizes, embedding.scale, form.dtype, norms=0)

    def read(self, module: str, rows: slice) -> torch.Tensor:
        if module != self.vocabulary.embedding:
            return self._matrices.read(module, rows)
        (whole,) = self._embedding.matrix
        return self._embedding.as_served(self._tensors, self._form, replace(whole, rows=rows))

    def pack(self, matrix: torch.Tensor) -> Weight:
        return self._embedding.ops.pack(matrix)

    def read_norms(self, own: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        return ()
