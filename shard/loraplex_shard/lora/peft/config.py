"""adapter_config.json, as PEFT writes it: what is served, and what is refused by name.

Knows nothing about tensors. PEFT's other fields that change what an adapter computes must be absent, null, false or
empty, because a value means a kind of adapter that this shard cannot serve. Fields that PEFT does not have are ignored,
as PEFT ignores them.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from loraplex_protos.errors import AdapterInvalidError

MAX_LORA_RANK = 512

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
        "peft_version",
        "qalora_group_size",
        "runtime_config",
        "velora_config",
    }
)
UNSUPPORTED_FIELDS = frozenset(
    {
        "arrow_config",
        "ensure_weight_tying",
        "kasa_config",
        "layer_replication",
        "monteclora_config",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
    }
)
# What PEFT targets in the served models if a config names no modules.
DEFAULT_TARGETS = ("q_proj", "v_proj")
_SHOWN_ERRORS = 5
_CONVERTED = (
    "init_lora_weights {!r}: the adapter belongs to a base from which its first weights were subtracted. Convert it to"
    " plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...) in PEFT; or serve the base that"
    " training saved, and set init_lora_weights to true"
)

_FEW = Field(max_length=4096)  # a few per module of the largest models
MAX_INVOCATION = 1024  # tokens, or characters
LoraRank = Annotated[int, Field(ge=1, le=MAX_LORA_RANK)]
_AnyCase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
# Initializations that leave the base as it is. The others subtract something from its weights.
_Initialization = bool | Literal["gaussian", "eva", "orthogonal", "mica"] | None
_SUBTRACTING = re.compile(r"pissa(_niter_\d+)?|olora|corda|lora_ga|loftq")


class AutoMapping(BaseModel):
    """The class that the adapter was trained on. PEFT writes it if there is no task_type."""

    model_config = ConfigDict(strict=True, frozen=True)

    base_model_class: str | None = None


class AdapterConfig(BaseModel):
    """The fields that decide which modules an adapter changes and by how much. Names and meanings are PEFT's."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    # The second is for embedding models. The others are mistakes that change nothing, unless the file has a head.
    task_type: (
        Literal["CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"] | None
    ) = None
    auto_mapping: AutoMapping | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: Annotated[_Initialization, _AnyCase] = True

    r: LoraRank
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool | None = False
    lora_bias: bool | None = False
    modules_to_save: Annotated[list[str], _FEW] | None = None
    rank_pattern: Annotated[dict[str, LoraRank], _FEW] | None = None
    alpha_pattern: Annotated[dict[str, float], _FEW] | None = None

    target_modules: Annotated[list[str], _FEW] | str | None = None
    target_parameters: Annotated[list[str], _FEW] | None = None
    exclude_modules: Annotated[list[str], _FEW] | str | None = None
    layers_to_transform: Annotated[list[int], _FEW] | int | None = None
    layers_pattern: Annotated[list[str], Field(max_length=16)] | str | None = None

    alora_invocation_tokens: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_INVOCATION)] | None
    ) = None
    # Of the library that had activated adapters before PEFT.
    invocation_string: Annotated[str, Field(min_length=1, max_length=MAX_INVOCATION)] | None = None

    @property
    def is_activated(self) -> bool:
        """Whether it acts only from a place in the prompt on: see invocation.py."""
        return self.alora_invocation_tokens is not None or self.invocation_string is not None

    @property
    def unknown_fields(self) -> list[str]:
        """Fields with a value that PEFT, in the version that this shard knows, does not have."""
        known = NEUTRAL_FIELDS | UNSUPPORTED_FIELDS
        return sorted(name for name, value in (self.model_extra or {}).items() if value and name not in known)


def parse_config(data: bytes) -> AdapterConfig:
    """Parses and validates the config. Raises AdapterInvalidError, naming the fields that are wrong or not
    supported."""
    try:
        config = AdapterConfig.model_validate_json(data)
    except ValidationError as error:
        raise AdapterInvalidError(f"adapter_config.json: {_kind(data) or _describe(error)}") from None
    _refuse_unsupported(config)
    _refuse_contradictions(config)
    return config


def _kind(data: bytes) -> str:
    """Says which other kind of adapter it is; empty if it is not of another kind."""
    try:
        fields: Any = json.loads(data)
        kind = fields.get("peft_type")
        if kind is None and fields.get("lora_parameters"):
            return "this is an adapter of MLX-LM (lora_parameters), not of PEFT: it has no peft_type"
        if kind.upper() != "LORA":
            return f"peft_type {kind[:100]!r} is not served, only 'LORA'"
        started = str(fields.get("init_lora_weights")).lower()
        return _CONVERTED.format(started) if _SUBTRACTING.fullmatch(started) else ""
    except (ValueError, AttributeError, TypeError, RecursionError):
        return ""


def _refuse_unsupported(config: AdapterConfig) -> None:
    fields = config.model_extra or {}
    refused = sorted(name for name, value in fields.items() if value and name in UNSUPPORTED_FIELDS)
    if "ensure_weight_tying" in refused and not _touches_tied(config):
        refused.remove("ensure_weight_tying")
    if refused:
        raise AdapterInvalidError(
            f"adapter_config.json: not supported: {', '.join(refused[:_SHOWN_ERRORS])} (must be absent, null or false)"
        )


def _touches_tied(config: AdapterConfig) -> bool:
    """Whether the adapter may touch the embedding or the lm head, for which ensure_weight_tying matters."""
    targets = config.target_modules
    if isinstance(targets, str):
        return targets.lower() != "all-linear" or bool(config.modules_to_save)
    names = {name.rpartition(".")[2] for name in (*(targets or ()), *(config.modules_to_save or ()))}
    return not names.isdisjoint(("lm_head", "embed_tokens"))


def _refuse_contradictions(config: AdapterConfig) -> None:
    """Refuses the combinations that PEFT refuses as well."""
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise AdapterInvalidError(
                    f"adapter_config.json: {name} cannot be combined with a string in target_modules: list the modules"
                )
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
    for other in (other for other, value in refused.items() if value):
        raise AdapterInvalidError(f"adapter_config.json: {name} cannot be combined with {other}: PEFT refuses both")
    everywhere = {"bias": config.bias != "none", "modules_to_save": config.modules_to_save}
    for other in (other for other, value in everywhere.items() if value):
        raise AdapterInvalidError(
            f"adapter_config.json: {name} cannot be combined with {other}, which would act before the invocation, too"
        )


def _describe(error: ValidationError) -> str:
    """The first few errors as "field: reason". The values are left out, since they may be long."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [": ".join((*(".".join(map(str, e["loc"]))[:100],) * bool(e["loc"]), e["msg"])) for e in errors]
    return "; ".join(lines[:_SHOWN_ERRORS])
