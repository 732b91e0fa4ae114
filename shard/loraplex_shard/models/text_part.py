"""The text model of a checkpoint whose model also reads pictures: its tensors, by their current names in
transformers."""

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loraplex_shard.checkpoint.base import Checkpoint
from loraplex_shard.ops.quantized import Quantized
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

    def read_quantized(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Quantized | None:
        return self._checkpoint.read_quantized(self._stored[name], rows, columns)

    def is_rounded(self, name: str) -> bool:
        return self._checkpoint.is_rounded(self._stored[name])


class TextModel(TextPart):
    """The text part as a checkpoint by itself, with transformers' class for the text model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, "model")
        self.model_id, self.classifies = checkpoint.model_id, checkpoint.classifies
        self.config: PreTrainedConfig = checkpoint.config.get_text_config(decoder=True)
        tied = getattr(checkpoint.config, "tie_word_embeddings", None)
        if tied is not None:
            self.config.tie_word_embeddings = tied
        alone = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(self.config.model_type)
        self.architecture = checkpoint.architecture if alone is None else str(alone)
