"""The rotary embedding's angles for all positions. The scaled frequencies come from transformers."""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.models.spec import RotarySpec
from loraplex_shard.ops.base import Rotary

PLAIN: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
}  # for configurations that do not describe it, such as GPT-J's


def rotary(config: PreTrainedConfig, spec: RotarySpec, max_model_len: int) -> Rotary:
    """The angles for positions below `max_model_len`.

    The angles of a position never change during a sequence, so cached keys stay valid and chunks may have any length.
    For types whose frequencies depend on the sequence's length:
      * dynamic: position p has the frequencies of length max(p + 1, the original maximum), as in transformers when it
        decodes token by token;
      * longrope: all positions have the long factors if max_model_len exceeds the original maximum, else the short
      ones.

    Raises CheckpointError for an unknown rope type.
    """
    positions = torch.arange(max_model_len)
    frequencies, scale = _frequencies(config, spec, positions)
    if frequencies.shape[-1] * 2 != spec.dim:
        raise CheckpointError("config.json: a rotary embedding of only a part of each head is not served")
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    place = -1 if spec.interleaved else -2
    cos, sin = (torch.stack(pair, dim=place).flatten(-2) for pair in ((cos, cos), (-sin, sin)))
    return Rotary(cos, sin, spec.interleaved, _query_scale(config, positions) if spec.scaled_queries else None)


def _query_scale(config: PreTrainedConfig, positions: torch.Tensor) -> torch.Tensor:
    """The scale of queries by position, as in Llama 4 and Ministral 3, with their names for its parameters."""
    parameters = config.rope_parameters
    lengths = torch.floor(positions / parameters["original_max_position_embeddings"])
    scale: torch.Tensor = 1 + parameters["llama_4_scaling_beta"] * torch.log(1 + lengths)
    return scale


def _frequencies(config: PreTrainedConfig, spec: RotarySpec, positions: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, [dim / 2] or one such row per position, and the scale of cos and sin."""
    parameters = getattr(config, "rope_parameters", None) or PLAIN
    if spec.layer_type is not None:
        parameters = parameters[spec.layer_type]
    kind = parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, spec.dim, 2, dtype=torch.float) / spec.dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    if kind not in ("linear", "dynamic", "yarn", "longrope", "llama3"):
        raise CheckpointError(f"config.json: rope type {kind!r} is not served")
    lengths = positions[:, None] + 1 if kind == "dynamic" else len(positions)
    compute = ROPE_INIT_FUNCTIONS[kind]
    frequencies, scale = compute(config, torch.device("cpu"), seq_len=lengths, layer_type=spec.layer_type)
    return frequencies, scale
