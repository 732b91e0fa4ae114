"""PEFT's other kinds of adapters (peft_type): the configurations of those that can be written as LoRA or as factors of
outputs, and what can be done with the others."""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from loraplex_shard.lora.peft.config import FEW, MAX_LORA_RANK, TO_MODEL, AdapterConfig, LoraRank, Tokens

_KEPT = re.compile(r"\.lora_E(\..*)?$")


def _count_kept(masks: Any) -> Any:
    """The lora_ranks that remain after AdaLoRA's masks, by patterns of module names."""
    if not isinstance(masks, dict):
        return masks
    return {re.escape(_KEPT.sub("", name)): sum(mask) for name, mask in masks.items() if isinstance(mask, list)}


class AdaLoraConfig(AdapterConfig):
    """AdaLoRA: A, B and a diagonal matrix between them."""

    NEUTRAL: ClassVar[frozenset[str]] = AdapterConfig.NEUTRAL | {
        "beta1", "beta2", "deltaT", "orth_reg_weight", "r", "target_r", "tfinal", "tinit", "total_step",
    }  # fmt: skip

    peft_type: Literal["ADALORA"]
    r: LoraRank = Field(12, validation_alias="init_r")
    rank_pattern: Annotated[
        dict[str, Annotated[int, Field(ge=0, le=MAX_LORA_RANK)]] | None, BeforeValidator(_count_kept)
    ] = None

    def scale(self, lora_rank: int, alpha: float) -> float:
        return (alpha if alpha > 0 else lora_rank) / (self.r + 1e-5)  # with any number of remaining ranks


class _LycorisConfig(AdapterConfig):
    NEUTRAL: ClassVar[frozenset[str]] = AdapterConfig.NEUTRAL | {
        "init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d",
    }  # fmt: skip

    lora_alpha: float = Field(8.0, validation_alias="alpha")


class LoHaConfig(_LycorisConfig):
    """The Hadamard product of two products."""

    peft_type: Literal["LOHA"]


class LoKrConfig(_LycorisConfig):
    """The Kronecker product of two matrices, each of which may be a product."""

    # The effect of these fields shows in the tensors' shapes.
    NEUTRAL: ClassVar[frozenset[str]] = _LycorisConfig.NEUTRAL | {
        "decompose_both", "decompose_factor", "rank_dropout_scale",
    }  # fmt: skip

    peft_type: Literal["LOKR"]


class VeraConfig(AdapterConfig):
    """A and B are shared by all modules, random and untrained. Each module has a vector for each of them."""

    NEUTRAL: ClassVar[frozenset[str]] = AdapterConfig.NEUTRAL | {"d_initial", "init_weights", "vera_dropout"}

    peft_type: Literal["VERA"]
    r: LoraRank = 256
    save_projection: bool = True
    projection_prng_key: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def scale(self, lora_rank: int, alpha: float) -> float:
        return 1.0


class MissConfig(AdapterConfig):
    """A trained B, with an A that sums the inputs whose indices have the same remainder."""

    NEUTRAL: ClassVar[frozenset[str]] = AdapterConfig.NEUTRAL | {"mini_r", "miss_dropout"}

    peft_type: Literal["MISS"]
    r: LoraRank = 64
    init_weights: bool | Literal["mini"] = True

    def scale(self, lora_rank: int, alpha: float) -> float:
        return 1.0


class Ia3Config(AdapterConfig):
    """A factor for each output, or for each input of feedforward modules."""

    NEUTRAL: ClassVar[frozenset[str]] = AdapterConfig.NEUTRAL | {"init_ia3_weights"}

    peft_type: Literal["IA3"]
    target_modules: Annotated[list[str], FEW] | str
    feedforward_modules: Annotated[list[str], FEW] | str


class TrainableTokensConfig(AdapterConfig):
    """Single tokens of the embedding or of the lm head, and nothing else."""

    NEUTRAL: ClassVar[frozenset[str]] = AdapterConfig.NEUTRAL | {"init_weights"}

    peft_type: Literal["TRAINABLE_TOKENS"]
    trainable_token_indices: Tokens = Field(validation_alias="token_indices")


KINDS: dict[str, type[AdapterConfig]] = {
    "LORA": AdapterConfig,
    "ADALORA": AdaLoraConfig,
    "LOHA": LoHaConfig,
    "LOKR": LoKrConfig,
    "VERA": VeraConfig,
    "MISS": MissConfig,
    "IA3": Ia3Config,
    "TRAINABLE_TOKENS": TrainableTokensConfig,
}

_NO_WEIGHTS = frozenset(
    {
        "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
        "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA",
    }
)  # fmt: skip
# For these kinds, PEFT's save_as_lora finds the nearest LoRA.
_CONVERTIBLE = frozenset(
    {
        "C3A", "DELORA", "FOURIERFT", "GRALORA", "MISS", "PSOFT", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "WAVEFT",
    }
)  # fmt: skip
TO_LORA = "convert it to LoRA with PEFT's save_as_lora(path, model, rank)"


def way_out(kind: str) -> str:
    """What a user can do with an adapter of a kind that is not served."""
    if kind == "ALORA":
        return "PEFT calls an activated adapter LORA, with alora_invocation_tokens: set peft_type to LORA"
    if kind in _NO_WEIGHTS:
        return "it changes more than weights, so there is no LoRA like it"
    return TO_LORA if kind in _CONVERTIBLE else TO_MODEL
