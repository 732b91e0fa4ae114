"""Every causal language model class of the installed transformers, with a configuration that makes it tiny."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, POSITIONS = 96, 64
HIDDEN = 64
# Configurations' names for the same sizes.
NAMES = (
    (VOCAB, "vocab_size vocab_size_per_layer_input"),
    (POSITIONS, "max_position_embeddings n_positions max_seq_len max_target_positions image_size"),
    (HIDDEN, "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim ffn_hidden_size output_channels"),
    (96, "intermediate_size n_inner ffn_dim decoder_ffn_dim dff intermediate_size_mlp shared_intermediate_size"),
    (4, "num_hidden_layers n_layer num_layers decoder_layers n_layers encoder_layers"),
    (4, "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_key_value_heads num_experts_per_tok moe_k moe_topk zero_expert_num num_global_layers"),
    (16, "head_dim global_head_dim kv_lora_rank qk_head_dim attention_head_dim encoder_ffn_dim"),
    (32, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size num_mel_bins"),
    (8, "sliding_window qk_rope_head_dim qk_nope_head_dim hidden_size_per_layer_input patch_size window_size"),
    (24, "q_lora_rank"),
    (12, "v_head_dim"),
    (1, "n_group topk_group first_k_dense_replace n_shared_experts eos_token_id"),
    (0, "pad_token_id bos_token_id num_kv_shared_layers"),
)
SIZES = {name: size for size, names in NAMES for name in names.split()}
PARTS = "text_config", "vision_config", "audio_config"
# The model_type of parts that may have any.
AUTO = {
    "fuyu": {"text_config": "persimmon"},
    "gemma3": {"vision_config": "siglip_vision_model"},
    "got_ocr2": {"text_config": "qwen2"},
    "moss_transcribe_diarize": {"text_config": "qwen3"},
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
GEMMA4_WITHOUT_LAYER_INPUTS = {
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 4}
SHARED = {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]}
OWN: dict[str, dict[str, Any] | None] = {  # None: with its default sizes
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4, "layer_types": LINEAR["layer_types"]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "chunk_size": 4,
    },
    "olmo_hybrid": LINEAR | {"linear_num_key_heads": 4},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_next": LINEAR,
    "zamba": SHARED | {"num_hidden_layers": 5},
    "zamba2": SHARED | {"num_hidden_layers": 5, "mamba_d_state": 16, "chunk_size": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 96}},
    "codegen": {"rotary_dim": 8},
    "dots3_note": None,
    "gemma4_assistant": {"text_config": GEMMA4_WITHOUT_LAYER_INPUTS},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "chunk_size": 4},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 4},  # these share keys and values
    "gemma4_text": {"num_hidden_layers": 12, "num_kv_shared_layers": 6},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["attention"] * 4},  # some models of the family have no Mamba layers
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"floor_scale": 4, "attn_scale": 0.5},  # queries that grow with their positions
    "longcat_flash": {"head_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"pad_token_id": None},  # on loading, transformers clears its row of the embedding
}


def classes() -> Iterator[tuple[str, type]]:
    """Each class once, with the model_type of its configuration."""
    seen = set()
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        for each in found if isinstance(found, tuple) else (found,):
            if each not in seen:
                seen.add(each)
                yield model_type, each


def tiny_config(model_type: str, **own: Any) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[model_type]
    config = kind(**_sizes(kind) | own)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _sizes(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    own = OWN.get(kind.model_type, {})
    if own is None:
        return {}
    known = {field.name for field in fields(kind)}
    sizes: dict[str, Any] = {name: size for name, size in SIZES.items() if name in known}
    if {"kv_lora_rank", "num_key_value_heads"} <= sizes.keys():
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for name in known.intersection(PARTS, kind.sub_configs):
        part = kind.sub_configs[name]
        if part is AutoConfig:  # any model; AUTO names one
            model = AUTO.get(kind.model_type, {}).get(name)
            sizes |= {name: {"model_type": model, **_sizes(CONFIG_MAPPING[model])}} if model else {}
        else:
            sizes[name] = _sizes(part)
    return sizes | own
