"""Architectures in the tradition of GPT: with layer norm, an MLP parallel to attention, and their own names."""

from transformers import PreTrainedConfig

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.layers.norm import NormSpec
from loraplex_shard.models.families.common import activation, decoder_spec
from loraplex_shard.models.spec import DecoderSpec, Names, RotarySpec

PHI = Names(
    final_norm="final_layernorm",
    o="self_attn.dense",
    gate_up=("mlp.fc1",),
    down="mlp.fc2",
    before_mlp=None,
)
GPTJ = Names(
    backbone="transformer",
    layers="h",
    embed="wte",
    final_norm="ln_f",
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    o="attn.out_proj",
    gate_up=("mlp.fc_in",),
    down="mlp.fc_out",
    before_attention="ln_1",
    before_mlp=None,
)


def stablelm(config: PreTrainedConfig) -> DecoderSpec:
    _refuse_head_norms(config)
    return decoder_spec(
        config,
        qkv_bias=config.use_qkv_bias,
        norm=_layer_norm(config.layer_norm_eps),
        partial=True,
        parallel=config.use_parallel_residual,
        names=Names(before_mlp=None) if config.use_parallel_residual else Names(),
    )


def phi(config: PreTrainedConfig) -> DecoderSpec:
    """Phi 1 and 2."""
    _refuse_head_norms(config)
    return decoder_spec(
        config,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
        norm=_layer_norm(config.layer_norm_eps),
        partial=True,
        parallel=True,
        gated=False,
        names=PHI,
    )


def gptj(config: PreTrainedConfig) -> DecoderSpec:
    if config.rotary_dim is None:
        raise CheckpointError("config.json: rotary_dim null is not served")
    return decoder_spec(
        config,
        intermediate_size=config.n_inner or 4 * config.hidden_size,
        kv_heads=config.num_attention_heads,
        mlp_bias=True,
        head_bias=True,
        norm=_layer_norm(config.layer_norm_epsilon),
        activation=activation(config.activation_function),
        rotary=(RotarySpec(config.rotary_dim, interleaved=True),) * config.num_hidden_layers,
        parallel=True,
        gated=False,
        names=GPTJ,
    )


def falcon(config: PreTrainedConfig) -> DecoderSpec:
    """Both generations of Falcon: 7B, and 40B with its `new_decoder_architecture`. Falcon 3 is a Llama."""
    if config.alibi:
        raise CheckpointError("config.json: alibi is not served")
    new = config.new_decoder_architecture
    two_norms = new and config.num_ln_in_parallel_attn in (None, 2)
    parallel = new or config.parallel_attn
    heads = config.num_attention_heads
    return decoder_spec(
        config,
        intermediate_size=config.ffn_hidden_size,
        kv_heads=config.num_kv_heads if new else 1 if config.multi_query else heads,
        qkv_by_group=True,
        qkv_bias=config.bias,
        o_bias=config.bias,
        mlp_bias=config.bias,
        norm=_layer_norm(config.layer_norm_epsilon),
        activation=activation(config.activation),
        parallel=parallel,
        gated=False,
        names=Names(
            backbone="transformer",
            layers="h",
            embed="word_embeddings",
            final_norm="ln_f",
            qkv=("self_attention.query_key_value",),
            o="self_attention.dense",
            gate_up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            before_attention="ln_attn" if two_norms else "input_layernorm",
            before_mlp="ln_mlp" if two_norms else None if parallel else "post_attention_layernorm",
        ),
    )


def _layer_norm(eps: float) -> NormSpec:
    return NormSpec(eps, centered=True, bias=True)


def _refuse_head_norms(config: PreTrainedConfig) -> None:
    if config.qk_layernorm:
        raise CheckpointError("config.json: qk_layernorm is not served")
