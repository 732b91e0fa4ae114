"""The cache object for transformers' modeling code. Keys and values are kept in our cache, so this one passes them
through. It holds the states of recurrent layers only while they are computed. It cannot keep anything else from step to
step."""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from loraplex_shard.checkpoint.base import CheckpointError

KNOWN_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    DummyLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


class StateKey(NamedTuple):
    """Which of a model's states."""

    kind: Literal["conv", "recurrent"]
    layer: int
    number: int  # among those of its kind in the layer


States = MutableMapping[StateKey, torch.Tensor]  # [sequences, ...]


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the cache among the arguments of the model's forward function."""
    return "cache_params" if "cache_params" in signature(model.forward).parameters else "past_key_values"


class PassThroughCache(DynamicCache):
    """Raises CheckpointError for a model that keeps more than keys, values and states."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        for layer in self.layers:
            if type(layer) not in KNOWN_LAYERS:
                raise CheckpointError(f"it keeps state besides keys and values ({type(layer).__name__})")
        self.positions: torch.Tensor | None = None  # [tokens] of the forward pass; None: the model counts them
        self.updates = 0  # how often keys and values were passed through
        self._held: States = {}

    @property
    def recurrent_layers(self) -> list[int]:
        """The layers that the configuration says keep states."""
        return [index for index, layer in enumerate(self.layers) if isinstance(layer, LinearAttentionCacheLayerMixin)]

    @contextmanager
    def holding(self, states: States) -> Iterator[None]:
        """While it is entered, layers continue from these states, and replace them. Sequences that begin have none."""
        held, self._held = self._held, states
        try:
            yield
        finally:
            self._held = held

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.updates += 1
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

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._held.get(StateKey("conv", layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._held.get(StateKey("recurrent", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As LinearAttentionLayer.update_conv_state does."""
        key = StateKey("conv", layer_idx, state_idx)
        before = self.get_conv_state(layer_idx, state_idx)
        if before is None:
            width = conv_kernel_size or conv_states.shape[-1]
            whole = pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))
        else:
            width = before.shape[-1]
            whole = torch.cat([before, conv_states], dim=-1)
        self._held[key] = whole[..., -width:]
        return whole

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        self._held[StateKey("recurrent", layer_idx, state_idx)] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return any(layer_idx in (None, key.layer) and state_idx in (None, key.number) for key in self._held)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise CheckpointError("it keeps state besides keys and values")

    update_indexer = _refuse
