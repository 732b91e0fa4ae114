"""Reads the fields that the configurations of most architectures have in common."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedConfig

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.layers.norm import NormSpec
from loraplex_shard.models.spec import DecoderSpec, RotarySpec
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


def decoder_spec(
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
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    said: dict[str, Callable[[], Any]] = {
        "intermediate_size": lambda: config.intermediate_size,
        "kv_heads": lambda: config.num_key_value_heads,
        "norm": lambda: NormSpec(config.rms_norm_eps),
        "activation": lambda: activation(config.hidden_act),
        "rotary": lambda: tuple(
            _rotary(config, layer, head_dim, partial, interleaved) if rotated is None or rotated[layer] else None
            for layer in range(layers)
        ),
    }
    for name, read in said.items():
        if name not in fields:
            fields[name] = read()
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        tied=getattr(config, "tie_word_embeddings", False),  # a text part may lack it
        windows=windows(config),
        **fields,
    )


def activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"config.json: hidden_act {name!r} is not served; these are: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
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
