"""Rotary embeddings whose frequencies depend on how long a sequence is. transformers makes them anew from the longest
position of each batch, which would give a sequence other angles for its neighbours' sake, and cached keys outdated
ones."""

from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraplex_shard.checkpoint.base import CheckpointError


def freeze_rotary(model: nn.Module, positions: int) -> None:
    """Gives every position the frequencies of sequences that are that long, as models/rope.py does.

    Raises CheckpointError where longer and shorter sequences would need others.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            module.rope_type = _freeze(module, kinds, None, positions)
        elif isinstance(kinds, dict):
            module.rope_type = {layer: _freeze(module, kind, layer, positions) for layer, kind in kinds.items()}


def _freeze(module: Any, kind: str, layer_type: str | None, positions: int) -> str:
    """The kind that the module is to take itself for."""
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
    return "default" if "dynamic" in kind or kind == "longrope" else kind
