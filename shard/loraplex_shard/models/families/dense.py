"""Architectures with an MLP in every layer, most of them Llama's successors."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.layers.norm import NormSpec
from loraplex_shard.models.families.common import activation, decoder_spec, windows
from loraplex_shard.models.spec import DecoderSpec, Names

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
GLM = Names(gate_up=("mlp.gate_up_proj",))
GLM4 = replace(GLM, behind_attention="post_self_attn_layernorm", behind_mlp="post_mlp_layernorm")
UNGATED = Names(gate_up=("mlp.up_proj",))
HYPERCLOVAX = Names(behind_attention="post_norm1", behind_mlp="post_norm2")
PHI = replace(GLM, qkv=("self_attn.qkv_proj",))


def llama(config: PreTrainedConfig) -> DecoderSpec:
    return decoder_spec(config, qkv_bias=config.attention_bias, o_bias=config.attention_bias, mlp_bias=config.mlp_bias)


def arcee(config: PreTrainedConfig) -> DecoderSpec:
    return replace(llama(config), gated=False, names=UNGATED)


def nemotron(config: PreTrainedConfig) -> DecoderSpec:
    return decoder_spec(
        config,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        norm=NormSpec(config.norm_eps, centered=True, bias=True, plus=1.0),
        partial=True,
        gated=False,
        names=UNGATED,
    )


def helium(config: PreTrainedConfig) -> DecoderSpec:
    return decoder_spec(config, qkv_bias=config.attention_bias, mlp_bias=config.mlp_bias, interleaved=True)


def ernie(config: PreTrainedConfig) -> DecoderSpec:
    bias = config.use_bias
    return decoder_spec(config, qkv_bias=bias, o_bias=bias, mlp_bias=bias, interleaved=True)


def mistral(config: PreTrainedConfig) -> DecoderSpec:
    return decoder_spec(config)


def ministral3(config: PreTrainedConfig) -> DecoderSpec:
    for name in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        if name not in config.rope_parameters:
            raise CheckpointError(f"config.json: rope_parameters has no {name}")
    spec = decoder_spec(config)
    return replace(spec, rotary=tuple(each and replace(each, scaled_queries=True) for each in spec.rotary))


def qwen2(config: PreTrainedConfig) -> DecoderSpec:
    return decoder_spec(config, qkv_bias=True)


def qwen3(config: PreTrainedConfig) -> DecoderSpec:
    return decoder_spec(config, qkv_bias=config.attention_bias, o_bias=config.attention_bias, qk_norm="head")


def gemma(config: PreTrainedConfig, **fields: Any) -> DecoderSpec:
    return decoder_spec(
        config,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        norm=NormSpec(config.rms_norm_eps, plus=1.0),
        embedding_scale=config.hidden_size**0.5,
        **fields,
    )


def gemma2(config: PreTrainedConfig, **fields: Any) -> DecoderSpec:
    return gemma(
        config,
        activation=activation(config.hidden_activation),
        attention_scale=config.query_pre_attn_scalar**-0.5,
        attention_soft_cap=config.attn_logit_softcapping or 0.0,
        logit_soft_cap=config.final_logit_softcapping or 0.0,
        names=GEMMA_NORMS,
        **fields,
    )


def gemma3(config: PreTrainedConfig) -> DecoderSpec:
    return gemma2(config, qk_norm="head")


def phi3(config: PreTrainedConfig) -> DecoderSpec:
    return decoder_spec(config, names=PHI, partial=True)


def granite(config: PreTrainedConfig, **fields: Any) -> DecoderSpec:
    return decoder_spec(
        config,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        attention_scale=config.attention_multiplier,
        embedding_scale=config.embedding_multiplier,
        residual_scale=config.residual_multiplier,
        logit_scale=1 / config.logits_scaling,
        **fields,
    )


def granite_dense(config: PreTrainedConfig) -> DecoderSpec:
    return granite(config, mlp_bias=config.mlp_bias)


def hyperclovax(config: PreTrainedConfig) -> DecoderSpec:
    names = HYPERCLOVAX if config.use_post_norm else Names()
    return replace(granite_dense(config), logit_scale=config.logits_scaling, names=names)


def olmo2(config: PreTrainedConfig) -> DecoderSpec:
    bias = config.attention_bias
    return decoder_spec(config, qkv_bias=bias, o_bias=bias, qk_norm="width", names=NORMS_BEHIND)


def exaone4(config: PreTrainedConfig) -> DecoderSpec:
    rotated = [config.sliding_window is None or window is not None for window in windows(config)]
    return decoder_spec(config, qk_norm="head", rotated=rotated, names=NORMS_BEHIND)


def smollm3(config: PreTrainedConfig) -> DecoderSpec:
    return decoder_spec(
        config,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        rotated=config.no_rope_layers,
    )


def glm(config: PreTrainedConfig) -> DecoderSpec:
    return decoder_spec(config, qkv_bias=config.attention_bias, partial=True, interleaved=True, names=GLM)


def glm4(config: PreTrainedConfig) -> DecoderSpec:
    return replace(glm(config), names=GLM4)


def glm4v(config: PreTrainedConfig) -> DecoderSpec:
    """The text model of models that read pictures."""
    return decoder_spec(config, qkv_bias=True, partial=True, interleaved=True, names=GLM4)


def cohere(config: PreTrainedConfig, **fields: Any) -> DecoderSpec:
    if getattr(config, "use_qk_norm", False):
        raise CheckpointError("config.json: use_qk_norm is not served")
    return decoder_spec(
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


def cohere2(config: PreTrainedConfig) -> DecoderSpec:
    return cohere(config, rotated=[window is not None for window in windows(config)])


def starcoder2(config: PreTrainedConfig) -> DecoderSpec:
    return decoder_spec(
        config,
        qkv_bias=config.use_bias,
        o_bias=config.use_bias,
        mlp_bias=config.use_bias,
        norm=NormSpec(config.norm_epsilon, centered=True, bias=True),
        gated=False,
        names=Names(gate_up=("mlp.c_fc",), down="mlp.c_proj"),
    )


def seed_oss(config: PreTrainedConfig) -> DecoderSpec:
    bias = config.attention_bias
    return decoder_spec(config, qkv_bias=bias, o_bias=config.attention_out_bias, mlp_bias=config.mlp_bias)
