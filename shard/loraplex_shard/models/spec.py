"""What the decoder needs to know about a model: its architecture as data."""

from dataclasses import dataclass
from typing import Literal

from loraplex_shard.layers.experts import ExpertsTensor
from loraplex_shard.layers.norm import NormSpec
from loraplex_shard.ops.base import Activation


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """One of the rotary embeddings of a configuration."""

    dim: int  # the number of a head's dimensions that are rotated
    interleaved: bool = False  # a pair is two neighbours, not one from each half
    layer_type: str | None = None  # the layers that it is for, if the configuration has several types
    scaled_queries: bool = False  # queries are scaled by position, with the configuration's parameters


@dataclass(frozen=True, slots=True)
class Names:
    """transformers' names of the decoder (`backbone`), its modules, and a layer's modules. If there is one name for
    several projections, the module holds them one after the other. None: there is no such norm."""

    backbone: str = "model"
    layers: str = "layers"
    embed: str = "embed_tokens"
    final_norm: str = "norm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    before_attention: str | None = "input_layernorm"
    behind_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    behind_mlp: str | None = None

    def layer(self, index: int) -> str:
        return f"{self.backbone}.{self.layers}.{index}"

    @property
    def embedding(self) -> str:
        return f"{self.backbone}.{self.embed}"


GATE_UP, DOWN = ExpertsTensor("mlp.experts.gate_up_proj"), ExpertsTensor("mlp.experts.down_proj")


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of experts instead of an MLP (arXiv 1701.06538): each token has the experts with its largest router
    scores.

    Module names are below model.layers.N; an expert's own, below EXPERTS.NUMBER.
    """

    count: int
    chosen: int  # experts per token
    intermediate_size: int  # of one expert
    layers: tuple[bool, ...]  # which have experts; the others have an MLP
    normalized: bool = True  # the weights of a token's experts add up to 1
    shared_size: int = 0  # intermediate size of the shared expert, which all tokens have; 0: there is none
    router: str = "mlp.gate"
    router_bias: bool = False
    experts: str = "mlp.experts"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    interleaved: bool = False  # gates and ups alternate if they are one tensor
    # Below model.layers.N: tensors of all experts, for checkpoints that do not have one for each expert.
    gate_up_tensor: ExpertsTensor = GATE_UP
    down_tensor: ExpertsTensor = DOWN
    shared: str = "mlp.shared_expert"
    shared_gate: str | None = "mlp.shared_expert_gate"  # None: the shared expert has no gate


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
    windows: tuple[int | None, ...]  # per layer: number of positions that a token sees, itself included; None: all
    rotary: tuple[RotarySpec | None, ...]  # per layer; None: queries and keys are not rotated
    qkv_bias: bool = False
    qkv_by_group: bool = False  # in a fused projection, each KV head follows the query heads that read it
    o_bias: bool = False
    sinks: bool = False  # attention has one more score for each head, without a position
    qk_norm: Literal["head", "width"] | None = None  # before rotation: over each head, or over all heads together
    attention_scale: float = 0.0  # scores are multiplied by this; 0: 1 / sqrt(head_dim)
    attention_soft_cap: float = 0.0  # 0: no cap
    activation: Activation = "silu"
    gated: bool = True
    mlp_bias: bool = False
    head_bias: bool = False
    parallel: bool = False  # the MLP has the same hidden states as attention
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # the outputs of attention and MLP are multiplied by this
    logit_scale: float = 1.0
    logit_soft_cap: float = 0.0  # 0: no cap
    names: Names = Names()
    experts: ExpertsSpec | None = None
    has_head: bool = True  # otherwise it only computes hidden states

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and self.experts.layers[layer]
