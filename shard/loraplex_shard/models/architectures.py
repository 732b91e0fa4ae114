"""Which architectures are served: for each, how its transformers configuration becomes a DecoderSpec.

A new architecture is one more function here, and a field in DecoderSpec for what is new about it.
"""

from collections.abc import Callable

from transformers import PreTrainedConfig

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.models.spec import DecoderSpec


def read_spec(architecture: str, config: PreTrainedConfig) -> DecoderSpec:
    """Raises CheckpointError for an architecture or a variant of one that is not served."""
    read = _ARCHITECTURES.get(architecture)
    if read is None:
        served = ", ".join(sorted(_ARCHITECTURES))
        raise CheckpointError(f"architecture {architecture!r} is not served; these are: {served}")
    if config.hidden_act not in ("silu", "swish"):  # one function's two names
        raise CheckpointError(f"config.json: hidden_act {config.hidden_act!r} is not served, only 'silu'")
    spec = read(config)
    if spec.heads % spec.kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {spec.heads} is not a multiple of num_key_value_heads {spec.kv_heads}"
        )
    return spec


def _llama(config: PreTrainedConfig) -> DecoderSpec:
    return _spec(config, qkv_bias=config.attention_bias, o_bias=config.attention_bias, mlp_bias=config.mlp_bias)


def _mistral(config: PreTrainedConfig) -> DecoderSpec:
    return _spec(config, windows=(config.sliding_window,) * config.num_hidden_layers)


def _qwen2(config: PreTrainedConfig) -> DecoderSpec:
    return _spec(config, qkv_bias=True, windows=_windows_by_layer_type(config))


def _qwen3(config: PreTrainedConfig) -> DecoderSpec:
    bias = config.attention_bias
    return _spec(config, qkv_bias=bias, o_bias=bias, qk_norm=True, windows=_windows_by_layer_type(config))


def _spec(
    config: PreTrainedConfig,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: tuple[int | None, ...] | None = None,
) -> DecoderSpec:
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        windows=windows or (None,) * config.num_hidden_layers,
    )


def _windows_by_layer_type(config: PreTrainedConfig) -> tuple[int | None, ...]:
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)


_ARCHITECTURES: dict[str, Callable[[PreTrainedConfig], DecoderSpec]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}
