"""The architectures that our own decoder computes. For each of them, a function turns transformers' configuration into
a DecoderSpec.

A new architecture is one more function here, and a field in DecoderSpec for what is new about it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.layers.experts import ExpertsTensor
from loraplex_shard.layers.norm import NormSpec
from loraplex_shard.models.spec import DecoderSpec, ExpertsSpec, Names, RotarySpec
from loraplex_shard.ops.base import Activation

# By transformers' names. Some functions have several names.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}
NORMS_BEHIND = Names(
    before_attention=None,
    behind_attention="post_attention_layernorm",
    before_mlp=None,
    behind_mlp="post_feedforward_layernorm",
)
GEMMA_NORMS = Names(
    behind_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    behind_mlp="post_feedforward_layernorm",
)
GRANITE_SHARED = Names(gate_up=("shared_mlp.input_linear",), down="shared_mlp.output_linear")
GLM = Names(gate_up=("mlp.gate_up_proj",))
PHI = replace(GLM, qkv=("self_attn.qkv_proj",))


def is_known(architecture: str) -> bool:
    """Whether our own decoder computes this architecture."""
    return architecture in _ARCHITECTURES or architecture in _TEXT_PARTS


def read_spec(architecture: str, config: PreTrainedConfig) -> DecoderSpec:
    """Raises CheckpointError for an unknown architecture, and for a variant that is not served."""
    if architecture in _TEXT_PARTS:
        return _text_part(architecture, config)
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(f"architecture {architecture!r} is not served")
    try:
        spec = _ARCHITECTURES[architecture](config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {type(error).__name__}: {error}") from error
    if spec.experts is not None and spec.experts.chosen > spec.experts.count:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {spec.experts.chosen} is more than the {spec.experts.count} experts"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise CheckpointError("config.json: use_bidirectional_attention is not served")
    if spec.heads % spec.kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {spec.heads} is not a multiple of num_key_value_heads {spec.kv_heads}"
        )
    return spec


def _text_part(architecture: str, config: PreTrainedConfig) -> DecoderSpec:
    """The spec of the text model in a model that also reads pictures: that of the text model by itself, with other
    names.
    """
    text = config.get_text_config(decoder=True)
    alone = _TEXT_TYPES.get(text.model_type) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type, text.model_type)
    spec = read_spec(str(alone), text)
    names = replace(spec.names, backbone=_TEXT_PARTS[architecture])
    return replace(spec, tied=config.tie_word_embeddings, names=names)


def _llama(config: PreTrainedConfig) -> DecoderSpec:
    return _spec(config, qkv_bias=config.attention_bias, o_bias=config.attention_bias, mlp_bias=config.mlp_bias)


def _mistral(config: PreTrainedConfig) -> DecoderSpec:
    return _spec(config)


def _ministral3(config: PreTrainedConfig) -> DecoderSpec:
    for name in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        if name not in config.rope_parameters:
            raise CheckpointError(f"config.json: rope_parameters has no {name}")
    spec = _spec(config)
    return replace(spec, rotary=tuple(each and replace(each, scaled_queries=True) for each in spec.rotary))


def _qwen2(config: PreTrainedConfig) -> DecoderSpec:
    return _spec(config, qkv_bias=True)


def _qwen3(config: PreTrainedConfig) -> DecoderSpec:
    return _spec(config, qkv_bias=config.attention_bias, o_bias=config.attention_bias, qk_norm="head")


def _gemma(config: PreTrainedConfig, **fields: Any) -> DecoderSpec:
    return _spec(
        config,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        norm=NormSpec(config.rms_norm_eps, plus=1.0),
        embedding_scale=config.hidden_size**0.5,
        **fields,
    )


def _gemma2(config: PreTrainedConfig, **fields: Any) -> DecoderSpec:
    return _gemma(
        config,
        activation=_activation(config.hidden_activation),
        attention_scale=config.query_pre_attn_scalar**-0.5,
        attention_soft_cap=config.attn_logit_softcapping or 0.0,
        logit_soft_cap=config.final_logit_softcapping or 0.0,
        names=GEMMA_NORMS,
        **fields,
    )


def _gemma3(config: PreTrainedConfig) -> DecoderSpec:
    return _gemma2(config, qk_norm="head")


def _phi3(config: PreTrainedConfig) -> DecoderSpec:
    return _spec(config, names=PHI, partial=True)


def _granite(config: PreTrainedConfig, **fields: Any) -> DecoderSpec:
    return _spec(
        config,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        attention_scale=config.attention_multiplier,
        embedding_scale=config.embedding_multiplier,
        residual_scale=config.residual_multiplier,
        logit_scale=1 / config.logits_scaling,
        **fields,
    )


def _granite_dense(config: PreTrainedConfig) -> DecoderSpec:
    return _granite(config, mlp_bias=config.mlp_bias)


def _granite_hybrid(config: PreTrainedConfig) -> DecoderSpec:
    """Granite 4's configuration. Only models without state spaces are served."""
    return _granite(
        config,
        intermediate_size=config.shared_intermediate_size,
        rotated=[config.position_embedding_type == "rope"] * config.num_hidden_layers,
        names=GRANITE_SHARED,
        experts=_granite_experts(config, config.shared_intermediate_size) if config.num_local_experts else None,
    )


def _granite_moe(config: PreTrainedConfig) -> DecoderSpec:
    return _granite(config, experts=_granite_experts(config, 0))


def _granite_moe_shared(config: PreTrainedConfig) -> DecoderSpec:
    size = config.shared_intermediate_size
    return _granite(config, names=GRANITE_SHARED, experts=_granite_experts(config, size))


def _granite_experts(config: PreTrainedConfig, shared_size: int) -> ExpertsSpec:
    return ExpertsSpec(
        count=config.num_local_experts,
        chosen=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        layers=(True,) * config.num_hidden_layers,
        shared_size=shared_size,
        router="block_sparse_moe.router.layer",
        experts="block_sparse_moe.experts",
        gate_up=("gate_up_proj",),
        gate_up_tensor=ExpertsTensor("block_sparse_moe.input_linear.weight"),
        down_tensor=ExpertsTensor("block_sparse_moe.output_linear.weight"),
        shared="shared_mlp",
        shared_gate=None,
    )


def _gpt_oss(config: PreTrainedConfig) -> DecoderSpec:
    if (config.swiglu_alpha, config.swiglu_limit) != (1.702, 7.0):
        raise CheckpointError("config.json: only swiglu_alpha 1.702 and swiglu_limit 7.0 are served")
    experts = ExpertsSpec(
        count=config.num_local_experts,
        chosen=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        layers=(True,) * config.num_hidden_layers,
        router="mlp.router",
        router_bias=True,
        gate_up=("gate_up_proj",),
        interleaved=True,
        gate_up_tensor=ExpertsTensor("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias", transposed=True),
        down_tensor=ExpertsTensor("mlp.experts.down_proj", "mlp.experts.down_proj_bias", transposed=True),
    )
    bias = config.attention_bias
    return _spec(config, qkv_bias=bias, o_bias=bias, sinks=True, activation="clamped_swiglu", experts=experts)


def _mixtral(config: PreTrainedConfig) -> DecoderSpec:
    experts = ExpertsSpec(
        count=config.num_local_experts,
        chosen=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        layers=(True,) * config.num_hidden_layers,
        router="block_sparse_moe.gate",
        experts="block_sparse_moe.experts",
        gate_up=("w1", "w3"),
        down="w2",
    )
    return _spec(config, experts=experts)


def _olmoe(config: PreTrainedConfig) -> DecoderSpec:
    if config.clip_qkv is not None:
        raise CheckpointError(f"config.json: clip_qkv {config.clip_qkv} is not served, only null")
    bias = config.attention_bias
    return _spec(
        config,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="width",
        experts=_experts(config, (True,) * config.num_hidden_layers, config.intermediate_size),
    )


def _qwen2_moe(config: PreTrainedConfig) -> DecoderSpec:
    experts = replace(_qwen_experts(config), shared_size=config.shared_expert_intermediate_size)
    return _spec(config, qkv_bias=config.qkv_bias, experts=experts)


def _qwen3_moe(config: PreTrainedConfig) -> DecoderSpec:
    return replace(_qwen3(config), experts=_qwen_experts(config))


def _qwen_experts(config: PreTrainedConfig) -> ExpertsSpec:
    layers = range(config.num_hidden_layers)
    step, dense = config.decoder_sparse_step, set(config.mlp_only_layers or ())
    held = tuple(config.num_experts > 0 and each not in dense and (each + 1) % step == 0 for each in layers)
    return _experts(config, held, config.moe_intermediate_size)


def _experts(config: PreTrainedConfig, layers: tuple[bool, ...], intermediate_size: int) -> ExpertsSpec:
    return ExpertsSpec(
        count=config.num_experts,
        chosen=config.num_experts_per_tok,
        intermediate_size=intermediate_size,
        layers=layers,
        normalized=config.norm_topk_prob,
    )


def _olmo2(config: PreTrainedConfig) -> DecoderSpec:
    bias = config.attention_bias
    return _spec(config, qkv_bias=bias, o_bias=bias, qk_norm="width", names=NORMS_BEHIND)


def _exaone4(config: PreTrainedConfig) -> DecoderSpec:
    windows = _windows(config)
    rotated = [config.sliding_window is None or window is not None for window in windows]
    return _spec(config, qk_norm="head", rotated=rotated, names=NORMS_BEHIND)


def _smollm3(config: PreTrainedConfig) -> DecoderSpec:
    return _spec(
        config,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        rotated=config.no_rope_layers,
    )


def _glm(config: PreTrainedConfig) -> DecoderSpec:
    return _spec(config, qkv_bias=config.attention_bias, partial=True, interleaved=True, names=GLM)


def _glm4(config: PreTrainedConfig) -> DecoderSpec:
    names = replace(GLM, behind_attention="post_self_attn_layernorm", behind_mlp="post_mlp_layernorm")
    return replace(_glm(config), names=names)


def _cohere(config: PreTrainedConfig, **fields: Any) -> DecoderSpec:
    if getattr(config, "use_qk_norm", False):
        raise CheckpointError("config.json: use_qk_norm is not served")
    return _spec(
        config,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        norm=NormSpec(config.layer_norm_eps, centered=True),
        interleaved=True,
        parallel=True,
        logit_scale=config.logit_scale,
        names=Names(before_mlp=None),
        **fields,
    )


def _cohere2(config: PreTrainedConfig) -> DecoderSpec:
    return _cohere(config, rotated=[window is not None for window in _windows(config)])


def _starcoder2(config: PreTrainedConfig) -> DecoderSpec:
    return _spec(
        config,
        qkv_bias=config.use_bias,
        o_bias=config.use_bias,
        mlp_bias=config.use_bias,
        norm=NormSpec(config.norm_epsilon, centered=True, bias=True),
        gated=False,
        names=Names(gate_up=("mlp.c_fc",), down="mlp.c_proj"),
    )


def _seed_oss(config: PreTrainedConfig) -> DecoderSpec:
    return _spec(config, qkv_bias=config.attention_bias, o_bias=config.attention_out_bias, mlp_bias=config.mlp_bias)


def _spec(
    config: PreTrainedConfig,
    *,
    partial: bool = False,
    interleaved: bool = False,
    rotated: list[bool] | None = None,
    **fields: Any,
) -> DecoderSpec:
    """The spec of a configuration with the usual fields. `fields` replaces or adds fields of DecoderSpec.

    partial: the rotary embedding may rotate only a part of each head. rotated: which layers have a rotary embedding, if
    not all.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = [_rotary(config, layer, head_dim, partial, interleaved) for layer in range(config.num_hidden_layers)]
    if "norm" not in fields:
        fields["norm"] = NormSpec(config.rms_norm_eps)
    if "activation" not in fields:
        fields["activation"] = _activation(config.hidden_act)
    alike = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "tied": getattr(config, "tie_word_embeddings", False),  # a text part may lack it
        "windows": _windows(config),
        "rotary": tuple(each if rotated is None or rotated[layer] else None for layer, each in enumerate(rotary)),
    }
    return DecoderSpec(**alike | fields)


def _activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"config.json: hidden_act {name!r} is not served; these are: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """For each layer, the number of positions that a token sees; None: all."""
    window: int | None = getattr(config, "sliding_window", None)
    types: Sequence[str] = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"config.json: layer_types: {', '.join(sorted(unknown))} is not served")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rotary(config: PreTrainedConfig, layer: int, head_dim: int, partial: bool, interleaved: bool) -> RotarySpec:
    parameters, layer_type = config.rope_parameters, None
    if "rope_type" not in parameters:
        layer_type = config.layer_types[layer]
        parameters = parameters[layer_type]
    dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0)) if partial else head_dim
    return RotarySpec(dim, interleaved, layer_type)


_ARCHITECTURES: dict[str, Callable[[PreTrainedConfig], DecoderSpec]] = {
    "Cohere2ForCausalLM": _cohere2,
    "CohereForCausalLM": _cohere,
    "Exaone4ForCausalLM": _exaone4,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "GemmaForCausalLM": _gemma,
    "Glm4ForCausalLM": _glm4,
    "GlmForCausalLM": _glm,
    "GraniteForCausalLM": _granite_dense,
    "GptOssForCausalLM": _gpt_oss,
    "GraniteMoeForCausalLM": _granite_moe,
    "GraniteMoeHybridForCausalLM": _granite_hybrid,
    "GraniteMoeSharedForCausalLM": _granite_moe_shared,
    "LlamaForCausalLM": _llama,
    "Ministral3ForCausalLM": _ministral3,
    "MinistralForCausalLM": _mistral,
    "MistralForCausalLM": _mistral,
    "MixtralForCausalLM": _mixtral,
    "Olmo2ForCausalLM": _olmo2,
    "Olmo3ForCausalLM": _olmo2,
    "OlmoeForCausalLM": _olmoe,
    "Phi3ForCausalLM": _phi3,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "SeedOssForCausalLM": _seed_oss,
    "SmolLM3ForCausalLM": _smollm3,
    "Starcoder2ForCausalLM": _starcoder2,
}

# The name of the text model in models that also read pictures.
_TEXT_PARTS = dict.fromkeys(
    (
        "AyaVisionForConditionalGeneration",
        "Cohere2VisionForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    ),
    "model.language_model",
) | dict.fromkeys(("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"), "model.text_model")

# Text models for which transformers has no class of their own, by model_type. For text alone, their positions are
# ordinary ones.
_TEXT_TYPES = {
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
}
