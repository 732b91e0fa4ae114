"""What the decoder needs to know of a model: its architecture as data."""

from dataclasses import dataclass
from typing import Literal

from loraplex_shard.layers.experts import ExpertsTensor
from loraplex_shard.layers.norm import NormSpec
from loraplex_shard.ops.base import Activation


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """A rotary embedding, one of those that the configuration describes."""

    dim: int  # how many of a head's dimensions turn
    interleaved: bool = False  # pairs are neighbours, else halves
    layer_type: str | None = None  # of the layers that it is for, where the configuration tells types apart
    scaled_queries: bool = False  # queries grow with their positions, as the configuration says


@dataclass(frozen=True, slots=True)
class Names:
    """What transformers calls the decoder (`backbone`), and a layer's modules. One name in place of several: it holds
    the projections one after the other. None: there is no such norm."""

    backbone: str = "model"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    before_attention: str | None = "input_layernorm"
    behind_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    behind_mlp: str | None = None

    def layer(self, index: int) -> str:
        return f"{self.backbone}.layers.{index}"

    @property
    def embedding(self) -> str:
        return f"{self.backbone}.embed_tokens"


GATE_UP, DOWN = ExpertsTensor("mlp.experts.gate_up_proj"), ExpertsTensor("mlp.experts.down_proj")


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of experts in place of an MLP (arXiv 1701.06538): each token has the experts that a router gives most.

    Module names are below model.layers.N; an expert's own, below EXPERTS.NUMBER.
    """

    count: int
    chosen: int  # by each token
    intermediate_size: int  # of one
    layers: tuple[bool, ...]  # which have experts; the others have an MLP
    normalized: bool = True  # the weights of a token's experts add up to 1
    shared_size: int = 0  # intermediate size of one more expert, which all tokens have; 0: there is none
    router: str = "mlp.gate"
    router_bias: bool = False
    experts: str = "mlp.experts"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    interleaved: bool = False  # gates and ups are neighbours where they are one tensor
    # Below model.layers.N: the tensors of all experts, where they are not one by one.
    gate_up_tensor: ExpertsTensor = GATE_UP
    down_tensor: ExpertsTensor = DOWN
    shared: str = "mlp.shared_expert"
    shared_gate: str | None = "mlp.shared_expert_gate"  # None: it is always open


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder with grouped-query attention and an MLP. Sizes are the whole model's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm: NormSpec
    tied: bool  # the lm head is the embedding
    windows: tuple[int | None, ...]  # per layer: how many positions a token sees, itself included; None: all
    rotary: tuple[RotarySpec | None, ...]  # per layer; None: queries and keys are not rotated
    qkv_bias: bool = False
    o_bias: bool = False
    sinks: bool = False  # attention has a score for no position at all
    qk_norm: Literal["head", "width"] | None = None  # before they are rotated: each head by itself, or all together
    attention_scale: float = 0.0  # of scores; 0: 1 / sqrt(head_dim)
    attention_soft_cap: float = 0.0  # 0: none
    activation: Activation = "silu"
    gated: bool = True
    mlp_bias: bool = False
    parallel: bool = False  # the MLP reads what attention reads
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_scale: float = 1.0
    logit_soft_cap: float = 0.0  # 0: none
    names: Names = Names()
    experts: ExpertsSpec | None = None
    has_head: bool = True  # else it makes hidden states alone

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and self.experts.layers[layer]
