"""The rotary embedding's angles, for every position at once; transformers supplies the scaled frequencies."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.ops.base import Rotary


def rotary(config: PreTrainedConfig, layer_type: str | None, dim: int, interleaved: bool, max_model_len: int) -> Rotary:
    """The angles of the first `dim` dimensions of each head, for positions below `max_model_len`.

    Where the configuration has a rotary embedding for each type of layer, `layer_type` names one.
    A position's angles never change during a sequence, so that cached keys stay valid and chunks may be of any
    length. Where the frequencies depend on the sequence's length:
      * dynamic: position p has those of length max(p + 1, the original maximum), which is what transformers uses
        when it decodes token by token;
      * longrope: all positions have the long factors if max_model_len exceeds the original maximum, else the short.

    Raises CheckpointError for an unknown rope type.
    """
    positions = torch.arange(max_model_len)
    frequencies, scale = _frequencies(config, layer_type, dim, positions)
    if frequencies.shape[-1] * 2 != dim:
        raise CheckpointError(
            f"config.json: the rotary embedding turns {frequencies.shape[-1] * 2} dimensions of each head, not {dim}"
        )
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    place = -1 if interleaved else -2
    cos, sin = (torch.stack(pair, dim=place).flatten(-2) for pair in ((cos, cos), (-sin, sin)))
    return Rotary(cos, sin, interleaved)


def rope_parameters(config: PreTrainedConfig, layer_type: str | None) -> Mapping[str, Any]:
    """What the configuration says about the rotary embedding, of these layers if it says it for each type."""
    parameters: Mapping[str, Any] = config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]


def _frequencies(
    config: PreTrainedConfig, layer_type: str | None, dim: int, positions: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, [dim / 2] or one such row per position, and what cos and sin are scaled by."""
    parameters = rope_parameters(config, layer_type)
    kind = parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    if kind not in ("linear", "dynamic", "yarn", "longrope", "llama3"):
        raise CheckpointError(f"config.json: rope type {kind!r} is not served")
    lengths = positions[:, None] + 1 if kind == "dynamic" else len(positions)
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=lengths, layer_type=layer_type)
    return frequencies, scale
