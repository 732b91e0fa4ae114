"""adapter_config.json, as PEFT writes it: what is served, and what is refused by name.

Knows nothing about tensors. PEFT's other fields that change what an adapter computes must be absent, null, false or
empty, because a value means a kind of adapter that this shard cannot serve. Fields that PEFT does not have are ignored,
as PEFT ignores them, unless a later PEFT may have written them.
"""

import math
import re
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.sources.model_config import read_labels

MAX_LORA_RANK = 512
TO_MODEL = "merge_and_unload() in PEFT makes a model of base and adapter, which can be served as a base"

# Fields that do not change what a trained adapter computes. fan_in_fan_out does not in linear layers.
NEUTRAL_FIELDS = frozenset(
    {
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "monteclora_config",
        "runtime_config",
        "velora_config",
    }
)
LABEL_FIELDS = frozenset({"id2label", "label2id", "num_labels"})
UNSUPPORTED_FIELDS = frozenset(
    {
        "arrow_config",
        "kasa_config",
        "layer_replication",
    }
)
# What a user can do with an adapter that has one of these fields.
_WAYS_OUT = {
    "arrow_config": "Arrow chooses among several adapters for each token: ask for one of them",
    "kasa_config": f"KaSA takes a part of the base's matrices away: {TO_MODEL}",
    "layer_replication": "it gives the base more layers, which other requests do not have: copy.deepcopy() of each of "
    "PEFT's layers, whose tensors are shared, and then merge_and_unload() make a model, which can be served as a base",
}
# Fields whose effect is on every position, so an activated adapter cannot have them.
_EVERYWHERE = ("modules_to_save", "trainable_token_indices", "layer_replication")
# What PEFT targets in the served models if a config names no modules.
DEFAULT_TARGETS = ("q_proj", "v_proj")
CLASSIFIERS = ("score", "classifier")  # as transformers calls them
_SHOWN = 5
_NEWEST_KNOWN = (0, 21, 2)  # the newest version of PEFT that is known here

FEW = Field(max_length=4096)  # a few per module of the largest models
MAX_INVOCATION = 1024  # tokens or characters
LoraRank = Annotated[int, Field(ge=1, le=MAX_LORA_RANK)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=2**18)]
_AnyCase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
Modules = Annotated[list[str], FEW] | str | None
# Initializations that leave the base as it is. The others subtract something from its weights.
_Initialization = bool | Literal["gaussian", "eva", "orthogonal", "mica"] | None


class AutoMapping(BaseModel):
    """The class that the adapter was trained on. PEFT writes it if there is no task_type."""

    model_config = ConfigDict(strict=True, frozen=True)

    base_model_class: str | None = None


class BlockDiagonal(BaseModel):
    """BD-LoRA: the modules whose A or B is block-diagonal. A module matches if its name contains one of these."""

    model_config = ConfigDict(strict=True, frozen=True)

    target_modules_bd_a: Annotated[list[str], FEW] | None = None
    target_modules_bd_b: Annotated[list[str], FEW] | None = None
    nblocks: Annotated[int, Field(ge=1, le=MAX_LORA_RANK)] = 1
    match_strict: bool = True


class AdapterConfig(BaseModel):
    """The fields that decide which modules an adapter changes and by how much. Names, meanings and defaults are PEFT's.
    kinds.py has the additional fields of other kinds than LoRA."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)

    NEUTRAL: ClassVar[frozenset[str]] = NEUTRAL_FIELDS

    peft_type: str
    peft_version: str | None = None
    # Values for other tasks than generation, embedding and classification are mistakes that change nothing.
    task_type: (
        Literal["CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"] | None
    ) = None
    auto_mapping: AutoMapping | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    bias: Literal["none", "all", "lora_only", "vera_only", "MiSS_only"] = "none"
    init_lora_weights: Annotated[_Initialization, _AnyCase] = True

    r: LoraRank = 8
    lora_alpha: float = 8.0
    use_rslora: bool | None = False
    use_dora: bool | None = False
    lora_bias: bool | None = False
    use_bdlora: BlockDiagonal | Literal[False] | None = None
    use_qalora: bool | None = False
    qalora_group_size: Annotated[int, Field(ge=1)] | None = 16
    modules_to_save: Annotated[list[str], FEW] | None = None
    trainable_token_indices: Tokens | dict[str, Tokens] | None = None
    ensure_weight_tying: bool | None = False
    rank_pattern: Annotated[dict[str, LoraRank], FEW] | None = None
    alpha_pattern: Annotated[dict[str, float], FEW] | None = None

    target_modules: Modules = None
    target_parameters: Annotated[list[str], FEW] | None = None
    exclude_modules: Modules = None
    layers_to_transform: Annotated[list[int], FEW] | int | None = None
    layers_pattern: Annotated[list[str], Field(max_length=16)] | str | None = None

    alora_invocation_tokens: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_INVOCATION)] | None
    ) = None
    # This field is from the library that had activated adapters before PEFT.
    invocation_string: Annotated[str, Field(min_length=1, max_length=MAX_INVOCATION)] | None = None

    @property
    def is_activated(self) -> bool:
        """Whether the adapter acts only from some place in the prompt on: see invocation.py."""
        return self.alora_invocation_tokens is not None or self.invocation_string is not None

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of its classifier, if somebody has written them here. PEFT does not."""
        return read_labels(self.model_extra or {})

    @property
    def unknown_fields(self) -> list[str]:
        """Fields with a value that PEFT, in the version that this shard knows, does not have."""
        known = self.NEUTRAL | LABEL_FIELDS | UNSUPPORTED_FIELDS
        return sorted(name for name, value in (self.model_extra or {}).items() if value and name not in known)

    def scale(self, lora_rank: int, alpha: float) -> float:
        """The factor of the product of A and B."""
        # Rank-stabilized LoRA: arXiv 2312.03732.
        return alpha / (math.sqrt(lora_rank) if self.use_rslora else lora_rank)


def check_config(config: AdapterConfig) -> None:
    """Raises AdapterInvalidError, naming the fields that are not supported or contradict each other."""
    _refuse_unsupported(config)
    _refuse_unknown(config)
    _refuse_contradictions(config)


def _refuse_unsupported(config: AdapterConfig) -> None:
    fields = config.model_extra or {}
    refused = sorted(name for name, value in fields.items() if value and name in UNSUPPORTED_FIELDS)
    if refused:
        raise AdapterInvalidError(
            f"adapter_config.json: not supported: {', '.join(refused[:_SHOWN])} (must be absent, null or false)"
            + "".join(f": {_WAYS_OUT[name]}" for name in refused[:1] if name in _WAYS_OUT)
        )


def _refuse_unknown(config: AdapterConfig) -> None:
    """Refuses unknown fields that switch something on, if a later version of PEFT has written them or they are called
    `use_`: they may change what the adapter computes. Numbers and names switch nothing on."""
    later, fields = _version(config.peft_version) > _NEWEST_KNOWN, config.model_extra or {}
    refused = [
        name
        for name in config.unknown_fields
        if (later or name.startswith("use_")) and (fields[name] is True or isinstance(fields[name], dict | list))
    ]
    if refused:
        raise AdapterInvalidError(
            f"adapter_config.json: {', '.join(name[:100] for name in refused[:_SHOWN])}: not known here, and may change"
            " what the adapter computes: remove it if it does not"
        )


def _version(text: str | None) -> tuple[int, ...]:
    """0.21.2.dev0@abc -> (0, 21, 2)"""
    return tuple(map(int, re.findall(r"(?:^|\.)(\d{1,9})", text or "")[:3]))


def _refuse_contradictions(config: AdapterConfig) -> None:
    """Refuses the combinations that PEFT refuses as well."""
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise AdapterInvalidError(
                    f"adapter_config.json: {name} cannot be combined with a string in target_modules: list the modules"
                )
    variants = "use_dora", "use_bdlora", "use_qalora"
    if len(used := [name for name in variants if getattr(config, name)]) > 1:
        raise AdapterInvalidError(f"adapter_config.json: {' and '.join(used)}: PEFT refuses these together")
    if config.use_qalora and config.qalora_group_size is None:
        raise AdapterInvalidError("adapter_config.json: use_qalora needs qalora_group_size")
    if config.use_dora and config.lora_bias:
        raise AdapterInvalidError("adapter_config.json: lora_bias has no meaning beside use_dora: PEFT refuses both")
    if config.layers_pattern and config.layers_to_transform is None:
        raise AdapterInvalidError("adapter_config.json: layers_pattern needs layers_to_transform")
    if config.is_activated:
        _refuse_beside_invocation(config)


def _refuse_beside_invocation(config: AdapterConfig) -> None:
    name = "invocation_string" if config.alora_invocation_tokens is None else "alora_invocation_tokens"
    refused = {"use_dora": config.use_dora, "target_parameters": config.target_parameters}
    refused["init_lora_weights mica"] = config.init_lora_weights == "mica"
    refused["use_bdlora"] = bool(config.use_bdlora)
    for other in (other for other, value in refused.items() if value):
        raise AdapterInvalidError(f"adapter_config.json: {name} cannot be combined with {other}: PEFT refuses both")
    everywhere = {other: getattr(config, other, None) for other in _EVERYWHERE}
    everywhere["bias"] = config.bias != "none"
    everywhere[f"peft_type {config.peft_type}"] = config.peft_type != "LORA"
    for other in (other for other, value in everywhere.items() if value):
        raise AdapterInvalidError(
            f"adapter_config.json: {name} cannot be combined with {other}, which would act before the invocation, too"
        )
