"""Turns a GGUF file's scaling of the rotary embedding into transformers' rope_parameters."""

from typing import Any

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.gguf.fields import Fields
from loraplex_shard.checkpoint.gguf.file import GgufTensor, floats

FACTORS = "rope_freqs.weight"  # divisors of the frequencies for any context: Llama 3's scaling
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"  # of Phi models


def read_rope(fields: Fields) -> dict[str, Any]:
    """Raises CheckpointError for an unknown kind of scaling."""
    theta = {"rope_theta": float(fields.number("rope.freq_base", 10000.0))}
    context = fields.integer("context_length")
    trained = fields.integer("rope.scaling.original_context_length", context)
    tensors = fields.file.tensors
    if LONG in tensors and SHORT in tensors:
        return theta | {
            "rope_type": "longrope",
            "short_factor": _list(tensors[SHORT]),
            "long_factor": _list(tensors[LONG]),
            "factor": context / trained,
            "original_max_position_embeddings": trained,
            "attention_factor": fields.number("rope.scaling.attn_factor", 1.0),
        }
    if FACTORS in tensors:
        # Only this type of transformers takes explicit factors. They are the same for short and long texts.
        factors = _list(tensors[FACTORS])
        return theta | {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "original_max_position_embeddings": context,
            "attention_factor": 1.0,
        }
    kind = fields.get("rope.scaling.type") or "none"
    factor = float(fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0)))
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(f"metadata {fields.architecture}.rope.scaling.type {kind!r} is not served")
    if kind == "none" or factor in (0.0, 1.0):
        return theta | {"rope_type": "default"}
    if kind == "linear":
        return theta | {"rope_type": "linear", "factor": factor}
    scales = float(fields.number("rope.scaling.yarn_log_multiplier", 0.0))
    return theta | {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": trained,
        "beta_fast": fields.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.number("rope.scaling.yarn_beta_slow", 1.0),
        **({"mscale": 1.0, "mscale_all_dim": scales} if scales else {}),
    }


def _list(tensor: GgufTensor) -> list[float]:
    values: list[float] = floats(tensor.data, tensor.kind)[0].tolist()
    return values
