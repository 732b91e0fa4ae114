"""A decoder's weights as it computes with them. They are read from the checkpoint again, since the layers' own are cut
for a rank and packed for its device."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from loraplex_shard.checkpoint.base import Checkpoint
from loraplex_shard.layers.embedding import Embedding
from loraplex_shard.layers.linear import Linear
from loraplex_shard.layers.norm import NormLayer
from loraplex_shard.layers.parameters import LoadableLayer, ParameterForm
from loraplex_shard.models.text_part import TextPart
from loraplex_shard.ops.base import Weight
from loraplex_shard.ops.quantized import Quantized
from loraplex_shard.shapes.layout import VocabularyLayout

Tensors = Checkpoint | TextPart


class ServedWeights:
    """The weights of layers that were loaded from these tensors in this form. `tied` is the name of the embedding's
    tensor if it is also the lm head."""

    resizable = True
    transposed = frozenset[str]()

    def __init__(
        self,
        layers: Iterable[LoadableLayer],
        tensors: Tensors,
        form: ParameterForm,
        tied: str | None,
        vocabulary: VocabularyLayout,
    ) -> None:
        layers = list(layers)
        linear = [layer for layer in layers if isinstance(layer, Linear)]
        self._layers = {part.module: (layer, part) for layer in linear for part in layer.layout.parts}
        self._embedding = next(layer for layer in layers if isinstance(layer, Embedding))
        self._norms = [layer for layer in layers if isinstance(layer, NormLayer)]
        self._tensors, self._form, self._tied = tensors, form, tied
        self.vocabulary = vocabulary

    @property
    def tied(self) -> bool:
        return self._tied is not None

    def has(self, module: str) -> bool:
        return module in self._layers

    def read(self, module: str, rows: slice) -> torch.Tensor:
        """Reads rows of the whole matrix of a linear module or of the embedding: [rows, in_features] float32."""
        if module == self.vocabulary.embedding:
            (tensor_slice,) = self._embedding.matrix
            return self._embedding.as_served(self._tensors, self._form, replace(tensor_slice, rows=rows))
        layer, part = self._layers[module]
        tensor_slice = replace(layer.weight_slice(part, rows).chosen(self._tensors), columns=slice(None))
        if self._tied is not None and module == "lm_head":
            tensor_slice = replace(tensor_slice, tensor=self._tied)
        return layer.as_served(self._tensors, self._form, tensor_slice)

    def pack(self, matrix: torch.Tensor) -> Weight:
        """Packs a matrix of floats for the operations that compute the model."""
        return self._embedding.ops.pack(matrix)

    @property
    def norms(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the tensors that are parameters of norms, by name."""
        return {each.tensor: each.shape for layer in self._norms for each in layer.all_slices}

    def read_norms(self, own: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """Reads this rank's parameters of all norms, by their numbers, with an adapter's own tensors in place of the
        base's. None: the adapter has nothing of a parameter."""
        found: list[torch.Tensor | None] = [None] * self.vocabulary.norms
        reader, form = _Overlaid(own, self._tensors), replace(self._form, device=torch.device("cpu"))
        for layer in self._norms:
            for place, (name, declared) in enumerate(layer.declared.items()):
                if any(each.tensor in own for each in declared.slices):
                    found[layer.index + place] = layer.read_parameter(name, reader, form)
        return tuple(found)


class _Overlaid:
    """A checkpoint with some other tensors in place of its own. Implements layers.parameters.TensorReader."""

    def __init__(self, own: Mapping[str, torch.Tensor], tensors: Tensors) -> None:
        self._own, self._tensors = own, tensors
        self.names = tensors.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        return self._own[name][rows] if name in self._own else self._tensors.read(name, rows, columns)

    def read_quantized(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Quantized | None:
        return None
