"""llama.cpp's architectures: the model of transformers that each one is, and how its configuration follows from the
metadata. What llama.cpp does not write to files, because its code knows it, is here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loraplex_shard.checkpoint.gguf.fields import Fields
from loraplex_shard.checkpoint.gguf.rope import read_rope


@dataclass(frozen=True, slots=True)
class Kind:
    model_type: str  # of transformers
    more: Callable[[Fields], Mapping[str, Any]] = lambda fields: {}
    eps: str = "rms_norm_eps"  # transformers' name for the norms' epsilon
    partial: bool = False  # whether only a part of each head may be rotated


def _attention_bias(fields: Fields) -> bool:
    return fields.has("blk.0.attn_q.bias") or fields.has("blk.0.attn_qkv.bias")


def _llama(fields: Fields) -> dict[str, Any]:
    return {"attention_bias": _attention_bias(fields), "mlp_bias": fields.has("blk.0.ffn_up.bias")}


def _mixtral(fields: Fields) -> dict[str, Any]:
    counts = fields.integer("expert_count"), fields.integer("expert_used_count")
    return {"num_local_experts": counts[0], "num_experts_per_tok": counts[1]}


def _experts(fields: Fields) -> dict[str, Any]:
    counts = fields.integer("expert_count"), fields.integer("expert_used_count")
    size = fields.integer("expert_feed_forward_length", fields.integer("feed_forward_length", 0))
    return {"num_experts": counts[0], "num_experts_per_tok": counts[1], "moe_intermediate_size": size}


def _qwen2_moe(fields: Fields) -> dict[str, Any]:
    shared = fields.integer("expert_shared_feed_forward_length", fields.integer("feed_forward_length", 0))
    return _experts(fields) | {"shared_expert_intermediate_size": shared}


def _window(fields: Fields) -> dict[str, Any]:
    """The sliding window, and which layers have it if the file says so; otherwise transformers' default holds."""
    pattern = fields.get("attention.sliding_window_pattern")
    types = [("full_attention", "sliding_attention")[each] for each in pattern] if isinstance(pattern, list) else None
    return {"sliding_window": fields.integer("attention.sliding_window", 0) or None, "layer_types": types}


def _gemma2(fields: Fields) -> dict[str, Any]:
    return {
        **_window(fields),
        "query_pre_attn_scalar": _query_scalar(fields, largest=46),
        "attn_logit_softcapping": fields.get("attn_logit_softcapping"),
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
    }


def _gemma3(fields: Fields) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa", 10000.0)}
    return {
        **_window(fields),
        "query_pre_attn_scalar": _query_scalar(fields, largest=62),
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
        "rope_parameters": {"full_attention": read_rope(fields), "sliding_attention": local},
    }


def _query_scalar(fields: Fields, largest: int) -> int:
    """The number whose root divides attention scores. In the largest Gemma model, which has `largest` layers, it is the
    hidden size divided by the number of heads."""
    if fields.integer("block_count") == largest:
        return fields.integer("embedding_length") // fields.integer("attention.head_count")
    return fields.head_dim


def _phi3(fields: Fields) -> dict[str, Any]:
    trained = fields.integer("rope.scaling.original_context_length", fields.integer("context_length"))
    window = fields.integer("attention.sliding_window", 0) or None
    return {"sliding_window": window, "original_max_position_embeddings": trained}


def _granite(fields: Fields) -> dict[str, Any]:
    return {
        "attention_bias": _attention_bias(fields),
        "mlp_bias": fields.has("blk.0.ffn_up.bias"),
        "attention_multiplier": fields.number("attention.scale", fields.head_dim**-0.5),
        "embedding_multiplier": fields.number("embedding_scale", 1.0),
        "residual_multiplier": fields.number("residual_scale", 1.0),
        "logits_scaling": fields.number("logit_scale", 1.0),
    }


def _granite_moe(fields: Fields) -> dict[str, Any]:
    return _granite(fields) | _mixtral(fields)


def _granite_moe_shared(fields: Fields) -> dict[str, Any]:
    return _granite_moe(fields) | {"shared_intermediate_size": fields.integer("expert_shared_feed_forward_length")}


def _gpt_oss(fields: Fields) -> dict[str, Any]:
    rope = read_rope(fields)
    return {
        **_window(fields),
        **_mixtral(fields),
        "attention_bias": _attention_bias(fields),
        "intermediate_size": fields.integer("expert_feed_forward_length", fields.integer("feed_forward_length", 0)),
        # This is how the models were trained; llama.cpp does not write it to the file.
        "rope_parameters": rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {}),
    }


def _cohere(fields: Fields) -> dict[str, Any]:
    return {"logit_scale": fields.number("logit_scale"), "use_qk_norm": fields.has("blk.0.attn_q_norm.weight")}


def _cohere2(fields: Fields) -> dict[str, Any]:
    return {**_window(fields), "logit_scale": fields.number("logit_scale")}


def _starcoder2(fields: Fields) -> dict[str, Any]:
    window = fields.integer("attention.sliding_window", 0) or None
    return {"sliding_window": window, "use_bias": _attention_bias(fields), "hidden_act": "gelu_pytorch_tanh"}


def _olmo2(fields: Fields) -> dict[str, Any]:
    return {"attention_bias": _attention_bias(fields)}


def _olmo3(fields: Fields) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base", 10000.0)}
    rope = {"full_attention": read_rope(fields), "sliding_attention": local}
    return {**_olmo2(fields), **_window(fields), "rope_parameters": rope}


def _olmoe(fields: Fields) -> dict[str, Any]:
    counts = fields.integer("expert_count"), fields.integer("expert_used_count")
    return {"num_experts": counts[0], "num_experts_per_tok": counts[1], "norm_topk_prob": False, **_olmo2(fields)}


def _exaone4(fields: Fields) -> dict[str, Any]:
    said = _window(fields)
    whole = ["full_attention"] * fields.integer("block_count")
    return said if said["sliding_window"] else said | {"layer_types": whole}


def _ministral3(fields: Fields) -> dict[str, Any]:
    beta = fields.number("attention.temperature_scale", 0.0)
    return {"rope_parameters": read_rope(fields) | {"llama_4_scaling_beta": beta}}


def _stablelm(fields: Fields) -> dict[str, Any]:
    return {
        "use_qkv_bias": _attention_bias(fields),
        "use_parallel_residual": not fields.has("blk.0.ffn_norm.weight"),
        "qk_layernorm": fields.has("blk.0.attn_q_norm.weight"),
    }


def _ernie(fields: Fields) -> dict[str, Any]:
    return {"use_bias": _attention_bias(fields)}


def _seed_oss(fields: Fields) -> dict[str, Any]:
    return {
        "attention_bias": _attention_bias(fields),
        "attention_out_bias": fields.has("blk.0.attn_output.bias"),
        "mlp_bias": fields.has("blk.0.ffn_up.bias"),
    }


KINDS: Mapping[str, Kind] = {
    "llama": Kind("llama", _llama),
    "qwen2": Kind("qwen2"),
    "qwen3": Kind("qwen3", _olmo2),
    "qwen2moe": Kind("qwen2_moe", _qwen2_moe),
    "qwen3moe": Kind("qwen3_moe", lambda fields: _experts(fields) | {"norm_topk_prob": True}),
    "gemma": Kind("gemma"),
    "gemma2": Kind("gemma2", _gemma2),
    "gemma3": Kind("gemma3_text", _gemma3),
    "phi2": Kind("phi", eps="layer_norm_eps", partial=True),
    "phi3": Kind("phi3", _phi3, partial=True),
    "granite": Kind("granite", _granite),
    "granitemoe": Kind("granitemoe", _granite_moe),
    "gpt-oss": Kind("gpt_oss", _gpt_oss),
    "command-r": Kind("cohere", _cohere, eps="layer_norm_eps"),
    "cohere2": Kind("cohere2", _cohere2, eps="layer_norm_eps"),
    "starcoder2": Kind("starcoder2", _starcoder2, eps="norm_epsilon"),
    "olmo2": Kind("olmo2", _olmo2),
    "olmoe": Kind("olmoe", _olmoe),
    "mistral3": Kind("ministral3", _ministral3),
    "exaone4": Kind("exaone4", _exaone4),
    "smollm3": Kind("smollm3", _llama),
    "glm4": Kind("glm4", _olmo2, partial=True),
    "nemotron": Kind("nemotron", _llama, eps="norm_eps", partial=True),
    "seed_oss": Kind("seed_oss", _seed_oss),
    "stablelm": Kind("stablelm", _stablelm, eps="layer_norm_eps", partial=True),
    "arcee": Kind("arcee", _llama),
    "ernie4_5": Kind("ernie4_5", _ernie),
    # The text models of models that read pictures. They are in separate files.
    "qwen2vl": Kind("qwen2"),
    "qwen3vl": Kind("qwen3", _olmo2),
    "qwen3vlmoe": Kind("qwen3_moe", lambda fields: _experts(fields) | {"norm_topk_prob": True}),
}
# By architecture: a file that has this metadata is another model of transformers.
VARIANTS: Mapping[str, Mapping[str, Kind]] = {
    "llama": {"expert_count": Kind("mixtral", _mixtral)},
    "granitemoe": {"expert_shared_feed_forward_length": Kind("granitemoeshared", _granite_moe_shared)},
    "olmo2": {"attention.sliding_window": Kind("olmo3", _olmo3)},
}


def architectures_of(model_class: str) -> frozenset[str]:
    """llama.cpp's names for a class of transformers."""
    kinds = [*KINDS.items(), *((name, kind) for name, others in VARIANTS.items() for kind in others.values())]
    names = {name for name, kind in kinds if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind.model_type] == model_class}
    return frozenset(names | ({"llama"} if model_class == "MistralForCausalLM" else set()))
