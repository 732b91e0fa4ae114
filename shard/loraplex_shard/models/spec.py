"""What the decoder needs to know of a model: its architecture as data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A pre-norm decoder with RoPE, grouped-query attention and a SiLU-gated MLP. Sizes are the whole model's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool  # the lm head is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMS norm of each query and key head before RoPE
    windows: tuple[int | None, ...]  # per layer: how many positions a token sees, itself included; None: all
