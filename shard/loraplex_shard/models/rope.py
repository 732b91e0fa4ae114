"""The rotary embedding's angles, for every position at once; transformers supplies the scaled frequencies."""

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraplex_shard.checkpoint.base import CheckpointError


def rope_tables(config: PreTrainedConfig, head_dim: int, max_model_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [max_model_len, head_dim] float32 by position; the first half of sin is negated, for ops/rotary.py.

    A position's angles never change during a sequence, so that cached keys stay valid and chunks may be of any
    length. Where the frequencies depend on the sequence's length:
      * dynamic: position p has those of length max(p + 1, the original maximum), which is what transformers uses
        when it decodes token by token;
      * longrope: all positions have the long factors if max_model_len exceeds the original maximum, else the short.

    Raises CheckpointError for an unknown rope type.
    """
    positions = torch.arange(max_model_len)
    frequencies, scale = _frequencies(config, head_dim, positions)
    if frequencies.shape[-1] * 2 != head_dim:
        raise CheckpointError("config.json: rotary embedding of a part of each head is not served")
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _frequencies(config: PreTrainedConfig, head_dim: int, positions: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, [head_dim / 2] or one such row per position, and what cos and sin are scaled by."""
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    if kind not in ("linear", "dynamic", "yarn", "longrope", "llama3"):
        raise CheckpointError(f"config.json: rope type {kind!r} is not served")
    lengths = positions[:, None] + 1 if kind == "dynamic" else len(positions)
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=lengths)
    return frequencies, scale
