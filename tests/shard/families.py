"""Tiny configurations of the architectures that our decoder supports besides Llama, and of their variants."""

from typing import Any

from transformers import (
    ArceeConfig,
    Cohere2Config,
    CohereConfig,
    Ernie4_5Config,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPTJConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    HeliumConfig,
    HyperCLOVAXConfig,
    Ministral3Config,
    MinistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

VOCABULARY = 96
MAX_MODEL_LEN = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **fields}


LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 3.0, 5.0]}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "logits_scaling": 2.0,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "gemma": GemmaConfig(**SIZES, head_dim=10),
    "gemma, another activation, tied": GemmaConfig(**SIZES, head_dim=8, hidden_act="relu", tie_word_embeddings=True),
    "gemma2": Gemma2Config(
        **SIZES,
        head_dim=10,
        sliding_window=9,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        head_dim=10,
        sliding_window=9,
        query_pre_attn_scalar=7,
        layer_types=MIXED,
        rope_parameters={
            "sliding_attention": rope("default"),
            "full_attention": rope("linear", factor=4.0) | {"rope_theta": 1e6},
        },
    ),
    "phi3": Phi3Config(**SIZES, sliding_window=7),
    "phi3, longrope on a part of each head": Phi3Config(
        **SIZES | {"hidden_size": 96},
        partial_rotary_factor=0.5,
        original_max_position_embeddings=16,
        rope_parameters=rope("longrope", **LONGROPE, partial_rotary_factor=0.5, original_max_position_embeddings=16),
        sliding_window=None,
    ),
    "granite": GraniteConfig(**SIZES, **MULTIPLIERS, attention_bias=True, mlp_bias=True),
    "granite 4": GraniteMoeHybridConfig(
        **SIZES,
        **MULTIPLIERS,
        num_local_experts=0,
        mamba_n_heads=6,
        shared_intermediate_size=56,
        layer_types=["attention"] * 3,
        position_embedding_type="rope",
    ),
    "granite 4, not rotated": GraniteMoeHybridConfig(
        **SIZES,
        **MULTIPLIERS,
        num_local_experts=0,
        mamba_n_heads=6,
        shared_intermediate_size=56,
        layer_types=["attention"] * 3,
        position_embedding_type="nope",
    ),
    "olmo2": Olmo2Config(**SIZES),
    "olmo3": Olmo3Config(
        **SIZES,
        sliding_window=6,
        layer_types=MIXED,
        rope_parameters={
            "sliding_attention": rope("default"),
            "full_attention": rope("yarn", factor=4.0, original_max_position_embeddings=16),
        },
    ),
    "exaone4": Exaone4Config(**SIZES, sliding_window=5, sliding_window_pattern=2),
    "exaone4, all layers equal": Exaone4Config(**SIZES, sliding_window=None, layer_types=["full_attention"] * 3),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2),
    "glm": GlmConfig(**SIZES, head_dim=8, attention_bias=True),
    "glm4": Glm4Config(**SIZES, head_dim=12, attention_bias=True),
    "cohere": CohereConfig(**SIZES, logit_scale=0.3),
    "cohere2": Cohere2Config(**SIZES, logit_scale=0.3, sliding_window=5, layer_types=MIXED),
    "starcoder2": Starcoder2Config(**SIZES, sliding_window=8, use_bias=True),
    "starcoder2, no biases, exact gelu": Starcoder2Config(
        **SIZES, sliding_window=None, use_bias=False, hidden_act="gelu"
    ),
    "ministral": MinistralConfig(**SIZES, head_dim=10, sliding_window=6, layer_types=MIXED),
    "ministral 3": Ministral3Config(
        **SIZES,
        head_dim=10,
        rope_parameters=rope(
            "yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.3, mscale=1.0
        ),
    ),
    "seed oss": SeedOssConfig(**SIZES, head_dim=10, attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "arcee": ArceeConfig(**SIZES, mlp_bias=True),
    "nemotron": NemotronConfig(**SIZES, head_dim=12),
    "helium": HeliumConfig(**SIZES, head_dim=8, attention_bias=True),
    "ernie 4.5": Ernie4_5Config(**SIZES, head_dim=10, use_bias=True),
    "hyperclova x": HyperCLOVAXConfig(**SIZES, **MULTIPLIERS, use_post_norm=True),
    "stablelm": StableLmConfig(**SIZES | {"hidden_size": 96}, use_qkv_bias=True),
    "stablelm, parallel": StableLmConfig(**SIZES, partial_rotary_factor=0.5, use_parallel_residual=True),
    "phi 2": PhiConfig(**SIZES, partial_rotary_factor=0.5),
    "gpt-j": GPTJConfig(**SIZES, n_positions=MAX_MODEL_LEN, n_embd=48, n_layer=3, n_head=6, rotary_dim=4),
    "falcon 7b": FalconConfig(**SIZES),
    "falcon 40b": FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False),
    "falcon 2": FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    "falcon, one after the other": FalconConfig(**SIZES, multi_query=False, parallel_attn=False, bias=True),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=5, sliding_window=None),
    "qwen3 moe": Qwen3MoeConfig(
        **SIZES, head_dim=10, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=40, norm_topk_prob=True
    ),
    "qwen3 moe, weights not normalized, some layers dense": Qwen3MoeConfig(
        **SIZES, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[1]
    ),
    "qwen2 moe, every other layer": Qwen2MoeConfig(
        **SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=56,
        decoder_sparse_step=2,
    ),
    "olmoe": OlmoeConfig(**SIZES, num_experts=7, num_experts_per_tok=4),
    "granite moe": GraniteMoeConfig(**SIZES, **MULTIPLIERS, num_local_experts=5, num_experts_per_tok=3),
    "granite moe, with a shared expert": GraniteMoeSharedConfig(
        **SIZES, **MULTIPLIERS, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=40
    ),
    "granite 4, experts": GraniteMoeHybridConfig(
        **SIZES,
        **MULTIPLIERS,
        num_local_experts=4,
        num_experts_per_tok=2,
        mamba_n_heads=6,
        shared_intermediate_size=56,
        layer_types=["attention"] * 3,
        position_embedding_type="rope",
    ),
    "gpt oss": GptOssConfig(
        **SIZES,
        head_dim=8,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=7,
        layer_types=MIXED,
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
    ),
}
