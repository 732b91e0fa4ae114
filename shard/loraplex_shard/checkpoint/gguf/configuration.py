"""Turns a GGUF file's metadata into transformers' configuration for the model."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.gguf.fields import Fields
from loraplex_shard.checkpoint.gguf.file import GgufFile
from loraplex_shard.checkpoint.gguf.kinds import KINDS, VARIANTS, Kind
from loraplex_shard.checkpoint.gguf.rope import read_rope

# Metadata that changes what a model computes. A file with one that its architecture does not read is refused.
CONSEQUENTIAL = (
    *("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "expert_count"),
    *("attention.temperature_scale", "attention.output_scale"),
    *("logit_scale", "embedding_scale", "residual_scale", "attn_logit_softcapping", "final_logit_softcapping"),
)


def read_config(file: GgufFile) -> PreTrainedConfig:
    """Raises CheckpointError for an architecture that is not served, and for metadata that is missing."""
    fields = Fields(file)
    if (held := file.metadata.get("general.type", "model")) != "model":
        raise CheckpointError(f"metadata general.type: it holds {held!r} and not a model: serve the model's own file")
    kind = KINDS.get(fields.architecture)
    if kind is None:
        raise CheckpointError(
            f"GGUF architecture {fields.architecture!r} is not served; these are: {', '.join(sorted(KINDS))}. "
            "Serve the model in its original format"
        )
    for key, other in VARIANTS.get(fields.architecture, {}).items():
        kind = other if fields.get(key) else kind
    values = _common(fields, kind) | dict(kind.more(fields))
    if "attention.sliding_window" not in fields.read:
        window = fields.integer("attention.sliding_window", 0)
        if 0 < window < fields.integer("context_length", 0):
            raise CheckpointError(f"metadata {fields.architecture}.attention.sliding_window {window} is not served")
    for key in CONSEQUENTIAL:
        if key not in fields.read and fields.get(key):
            raise CheckpointError(f"metadata {fields.architecture}.{key} {fields.get(key)!r} is not served")
    if not fields.get("attention.causal", True):
        raise CheckpointError(f"metadata {fields.architecture}.attention.causal: only models that generate are served")
    tokens = {f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    values |= {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind.model_type]], "pad_token_id": None, **tokens}
    try:
        return CONFIG_MAPPING[kind.model_type](**values)
    except Exception as error:  # transformers' classes compute with what the file says, whatever that is
        raise CheckpointError(f"metadata: {error}") from error


def _common(fields: Fields, kind: Kind) -> dict[str, Any]:
    for key in ("attention.head_count", "attention.head_count_kv", "embedding_length", "block_count"):
        if fields.integer(key, 1) < 1:
            raise CheckpointError(f"metadata {fields.architecture}.{key} {fields.integer(key)} must be at least 1")
    if not kind.partial and fields.rotated_part != 1:
        part = fields.integer("rope.dimension_count")
        raise CheckpointError(
            f"metadata {fields.architecture}.rope.dimension_count {part} is not the head's {fields.head_dim}"
        )
    heads = fields.integer("attention.head_count")
    eps = "attention.layer_norm_rms_epsilon" if kind.eps == "rms_norm_eps" else "attention.layer_norm_epsilon"
    embedding = fields.file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError("missing tensor token_embd.weight")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": fields.integer("embedding_length"),
        "intermediate_size": fields.integer("feed_forward_length", 0),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": fields.head_dim,
        kind.eps: fields.number(eps),
        "max_position_embeddings": fields.integer("context_length"),
        "tie_word_embeddings": not fields.has("output.weight"),
        "rope_parameters": read_rope(fields) | ({"partial_rotary_factor": fields.rotated_part} if kind.partial else {}),
    }
