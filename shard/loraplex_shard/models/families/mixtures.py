"""Architectures with a mixture of experts in some layers or all."""

from dataclasses import replace

from transformers import PreTrainedConfig

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.layers.experts import ExpertsTensor
from loraplex_shard.models.families.common import decoder_spec
from loraplex_shard.models.families.dense import granite, qwen3
from loraplex_shard.models.spec import DOWN, GATE_UP, DecoderSpec, ExpertsSpec, Names

GRANITE_SHARED = Names(gate_up=("shared_mlp.input_linear",), down="shared_mlp.output_linear")


def granite_hybrid(config: PreTrainedConfig) -> DecoderSpec:
    """Granite 4's configuration. Only models without state spaces are served."""
    return granite(
        config,
        intermediate_size=config.shared_intermediate_size,
        rotated=[config.position_embedding_type == "rope"] * config.num_hidden_layers,
        names=GRANITE_SHARED,
        experts=_granite_experts(config, config.shared_intermediate_size) if config.num_local_experts else None,
    )


def granite_moe(config: PreTrainedConfig) -> DecoderSpec:
    return granite(config, experts=_granite_experts(config, 0))


def granite_moe_shared(config: PreTrainedConfig) -> DecoderSpec:
    size = config.shared_intermediate_size
    return granite(config, names=GRANITE_SHARED, experts=_granite_experts(config, size))


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


def gpt_oss(config: PreTrainedConfig) -> DecoderSpec:
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
        gate_up_tensor=ExpertsTensor("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias", transposed=None),
        down_tensor=ExpertsTensor("mlp.experts.down_proj", "mlp.experts.down_proj_bias", transposed=True),
    )
    bias = config.attention_bias
    return decoder_spec(config, qkv_bias=bias, o_bias=bias, sinks=True, activation="clamped_swiglu", experts=experts)


def mixtral(config: PreTrainedConfig) -> DecoderSpec:
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
    return decoder_spec(config, experts=experts)


def olmoe(config: PreTrainedConfig) -> DecoderSpec:
    if config.clip_qkv is not None:
        raise CheckpointError(f"config.json: clip_qkv {config.clip_qkv} is not served, only null")
    bias = config.attention_bias
    return decoder_spec(
        config,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="width",
        experts=_experts(config, (True,) * config.num_hidden_layers, config.intermediate_size, config.norm_topk_prob),
    )


def qwen2_moe(config: PreTrainedConfig) -> DecoderSpec:
    experts = replace(_qwen_experts(config, config.norm_topk_prob), shared_size=config.shared_expert_intermediate_size)
    return decoder_spec(config, qkv_bias=config.qkv_bias, experts=experts)


def qwen3_moe(config: PreTrainedConfig) -> DecoderSpec:
    return replace(qwen3(config), experts=_qwen_experts(config, config.norm_topk_prob))


def qwen3_vl_moe(config: PreTrainedConfig) -> DecoderSpec:
    """In the first files, the matrices of all experts are [in_features, out_features]; in later ones they are not."""
    experts = replace(
        _qwen_experts(config, normalized=True),
        gate_up_tensor=replace(GATE_UP, transposed=None),
        down_tensor=replace(DOWN, transposed=None),
    )
    return replace(qwen3(config), experts=experts)


def _qwen_experts(config: PreTrainedConfig, normalized: bool) -> ExpertsSpec:
    layers = range(config.num_hidden_layers)
    step, dense = config.decoder_sparse_step, set(config.mlp_only_layers or ())
    held = tuple(config.num_experts > 0 and each not in dense and (each + 1) % step == 0 for each in layers)
    return _experts(config, held, config.moe_intermediate_size, normalized)


def _experts(
    config: PreTrainedConfig, layers: tuple[bool, ...], intermediate_size: int, normalized: bool
) -> ExpertsSpec:
    return ExpertsSpec(
        count=config.num_experts,
        chosen=config.num_experts_per_tok,
        intermediate_size=intermediate_size,
        layers=layers,
        normalized=normalized,
    )
