"""Fixes rotary embeddings whose frequencies depend on a sequence's length. transformers computes them again from the
largest position of each batch. A sequence's angles would then depend on its neighbours, and cached keys would have
outdated ones."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraplex_shard.checkpoint.base import CheckpointError


def freeze_rotary(model: nn.Module, positions: int) -> None:
    """Gives every position the frequencies for sequences of `positions` positions, as models/rope.py does.

    Raises CheckpointError for dynamic scaling beyond the original length, where each length has its own frequencies.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            module.rope_type = _freeze(module, kinds, None, positions)
        elif isinstance(kinds, dict):
            module.rope_type = {layer: _freeze(module, kind, layer, positions) for layer, kind in kinds.items()}


def _freeze(module: Any, kind: str, layer_type: str | None, positions: int) -> str:
    """Fixes a module's frequencies. Returns the rope type that the module gets."""
    if "dynamic" in kind and positions > module.original_max_seq_len:
        raise CheckpointError(
            f"rope type {kind!r} has other frequencies for each length beyond {module.original_max_seq_len} positions: "
            "set max_model_len to at most that"
        )
    if kind == "longrope":
        options = {} if layer_type is None else {"layer_type": layer_type}
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        device = getattr(module, name).device
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, device, seq_len=positions, **options)
        module.register_buffer(name, frequencies, persistent=False)
        if "long_mscale" in module.config.rope_parameters:
            _freeze_scale(module, frequencies, positions)
    return "default" if "dynamic" in kind or kind == "longrope" else kind


def _freeze_scale(module: Any, frequencies: torch.Tensor, positions: int) -> None:
    """Fixes Phi 3.5 with experts, which reads its configuration in every pass."""
    parameters = module.config.rope_parameters
    is_long = positions > parameters["original_max_position_embeddings"]
    scale = parameters["long_mscale" if is_long else "short_mscale"]
    module.config = SimpleNamespace(rope_parameters={"rope_type": "default"})
    module.rope_init_fn = lambda config: (frequencies, scale)
