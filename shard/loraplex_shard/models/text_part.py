"""The text model of a checkpoint whose model also reads pictures: its tensors, by their current names in
transformers."""

import torch

from loraplex_shard.checkpoint.base import Checkpoint
from loraplex_shard.ops.quantized import QuantizedMatrix
from loraplex_shard.shapes.names import current_name


class TextPart:
    """Implements layers.parameters.TensorReader. Tensors of other parts are ignored."""

    def __init__(self, checkpoint: Checkpoint, backbone: str) -> None:
        """`backbone` is the text model's name in the whole model, such as model.language_model."""
        self._checkpoint = checkpoint
        named = ((current_name(stored, backbone), stored) for stored in checkpoint.names)
        self._stored = {name: stored for name, stored in named if name is not None}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(self._stored[name])

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        return self._checkpoint.read(self._stored[name], rows, columns)

    def read_quantized(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> QuantizedMatrix | None:
        return self._checkpoint.read_quantized(self._stored[name], rows, columns)

    def is_rounded(self, name: str) -> bool:
        return self._checkpoint.is_rounded(self._stored[name])
