"""adapter_config.json, as PEFT writes it: what is served, and what is refused by name.

Knows no tensors. A field that is not listed here may be absent, null, false or empty; any other value means a kind of
adapter that this shard cannot serve, whatever PEFT version introduced it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraplex_protos.errors import AdapterInvalidError

MAX_LORA_RANK = 512

# Fields that have no say in what the trained adapter computes.
_NEUTRAL_FIELDS = frozenset(
    {
        "base_model_name_or_path",
        "eva_config",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
    }
)
_SHOWN_ERRORS = 5

_FEW = Field(max_length=4096)  # a few per module of the largest models
LoraRank = Annotated[int, Field(ge=1, le=MAX_LORA_RANK)]


class AutoMapping(BaseModel):
    """Written by PEFT where it has no task_type: which class the adapter was trained on."""

    model_config = ConfigDict(strict=True, frozen=True)

    base_model_class: str | None = None


class AdapterConfig(BaseModel):
    """The fields that decide which modules an adapter changes and by how much. Names and meanings are PEFT's."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    auto_mapping: AutoMapping | None = None
    bias: Literal["none"] = "none"
    # Initializations that leave the base as it is; the others subtract something from its weights.
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal"] | None = True

    r: LoraRank
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Annotated[dict[str, LoraRank], _FEW] | None = None
    alpha_pattern: Annotated[dict[str, float], _FEW] | None = None

    target_modules: Annotated[list[str], _FEW] | str
    exclude_modules: Annotated[list[str], _FEW] | str | None = None
    layers_to_transform: Annotated[list[int], _FEW] | int | None = None
    layers_pattern: Annotated[list[str], Field(max_length=16)] | str | None = None


def parse_config(data: bytes, architecture: str) -> AdapterConfig:
    """The validated config of an adapter for a base model of this architecture (e.g. "LlamaForCausalLM").

    Raises AdapterInvalidError naming the fields that are wrong or not supported.
    """
    try:
        config = AdapterConfig.model_validate_json(data)
    except ValidationError as error:
        raise AdapterInvalidError(f"adapter_config.json: {_describe(error)}") from None
    _refuse_unsupported(config)
    _refuse_contradictions(config)
    base = config.auto_mapping.base_model_class if config.auto_mapping else None
    if base is not None and base != architecture:
        raise AdapterInvalidError(
            f"adapter_config.json: auto_mapping.base_model_class is {base[:100]!r}, but this model is a"
            f" {architecture}: the adapter was made for another base"
        )
    return config


def _refuse_unsupported(config: AdapterConfig) -> None:
    fields = config.model_extra or {}
    refused = sorted(name[:100] for name, value in fields.items() if value and name not in _NEUTRAL_FIELDS)
    if refused:
        raise AdapterInvalidError(
            f"adapter_config.json: not supported: {', '.join(refused[:_SHOWN_ERRORS])} (must be absent, null or false)"
        )


def _refuse_contradictions(config: AdapterConfig) -> None:
    """The combinations that PEFT refuses as well."""
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise AdapterInvalidError(
                    f"adapter_config.json: {name} has no meaning where target_modules is a string: list the modules"
                )
    if config.layers_pattern and config.layers_to_transform is None:
        raise AdapterInvalidError("adapter_config.json: layers_pattern needs layers_to_transform")


def _describe(error: ValidationError) -> str:
    """The first few errors as "field: reason", without the values, which may be long."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [": ".join((*(".".join(map(str, e["loc"]))[:100],) * bool(e["loc"]), e["msg"])) for e in errors]
    return "; ".join(lines[:_SHOWN_ERRORS])
