"""A decoder's matrices as it computes with them. They are read from the checkpoint again, since the layers' own
matrices are cut for a rank and packed for its device."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from loraplex_shard.checkpoint.base import Checkpoint
from loraplex_shard.layers.linear import Linear
from loraplex_shard.layers.parameters import LoadableLayer, ParameterForm
from loraplex_shard.models.text_part import TextPart


class ServedMatrices:
    """The matrices of layers that were loaded from these tensors in this form. `tied` is the name of the embedding's
    tensor if it is also the lm head."""

    def __init__(
        self, layers: Iterable[LoadableLayer], tensors: Checkpoint | TextPart, form: ParameterForm, tied: str | None
    ) -> None:
        linear = [layer for layer in layers if isinstance(layer, Linear)]
        self._layers = {part.module: (layer, part) for layer in linear for part in layer.layout.parts}
        self._tensors, self._form, self._tied = tensors, form, tied

    @property
    def tied(self) -> bool:
        return self._tied is not None

    def read(self, module: str, rows: slice) -> torch.Tensor:
        """Reads rows of a linear module's whole matrix: [rows, in_features] float32."""
        layer, part = self._layers[module]
        tensor_slice = replace(layer.weight_slice(part, rows).chosen(self._tensors), columns=slice(None))
        if self._tied is not None and module == "lm_head":
            tensor_slice = replace(tensor_slice, tensor=self._tied)
        return layer.as_served(self._tensors, self._form, tensor_slice)
