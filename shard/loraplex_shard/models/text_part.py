"""The text model of a checkpoint that reads pictures as well: its tensors, as transformers calls them.

Versions of transformers have saved the same model under several names: language_model.model.layers, model.layers,
model.language_model.layers.
"""

import re

import torch

from loraplex_shard.checkpoint.base import Checkpoint
from loraplex_shard.ops.quantized import QuantizedMatrix

HEAD = "lm_head"
_TEXT = re.compile(
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?|^model\.(?=(?:layers|embed_tokens|norm)\.)"
)


class TextPart:
    """Implements layers.sources.TensorReader. The tensors of other parts are left alone."""

    def __init__(self, checkpoint: Checkpoint, backbone: str) -> None:
        """`backbone`: the text model's name in the whole one, such as model.language_model."""
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


def current_name(stored: str, backbone: str) -> str | None:
    """What transformers calls a tensor or module now; None: it belongs to no text model."""
    rest = _TEXT.sub("", stored)
    if rest.split(".")[0] == HEAD:
        return rest
    return None if rest == stored else f"{backbone}.{rest}"
