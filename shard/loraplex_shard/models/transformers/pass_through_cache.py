"""The cache object for transformers' modeling code. Keys and values are kept in our cache, so this one passes them
through. It cannot keep anything else from step to step."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from loraplex_shard.checkpoint.base import CheckpointError

KEYS_AND_VALUES = DynamicLayer, DynamicSlidingWindowLayer, DummyLayer


class PassThroughCache(DynamicCache):
    """Raises CheckpointError for a model that keeps more than keys and values."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        for layer in self.layers:
            if type(layer) not in KEYS_AND_VALUES:
                raise CheckpointError(f"it keeps state besides keys and values ({type(layer).__name__})")
        self.positions: torch.Tensor | None = None  # [tokens] of the forward pass; None: the model counts them

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """What attention adds to a token's index if it looks at positions itself, as Llama 4's does. The tokens of a
        batch belong to many sequences, so there is a length for each token."""
        if layer_idx is None or self.positions is None:
            return 0
        return self.positions - torch.arange(len(self.positions), device=self.positions.device)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise CheckpointError("it keeps state besides keys and values")

    update_conv_state = get_conv_state = update_recurrent_state = get_recurrent_state = _refuse
    update_indexer = has_previous_state = _refuse
