"""Parses adapter_config.json into the configuration of one of the kinds that are served."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loraplex_protos.errors import AdapterInvalidError, AdapterSourceError
from loraplex_shard.lora.peft.config import TO_MODEL, AdapterConfig, check_config
from loraplex_shard.lora.peft.gguf import gguf_config, is_gguf
from loraplex_shard.lora.peft.gguf_metadata import MAGIC, read_metadata
from loraplex_shard.lora.peft.kinds import KINDS, way_out
from loraplex_shard.lora.peft.mlx import is_mlx, mlx_config
from loraplex_shard.lora.sources.files import CONFIG, AdapterFiles, read_file

_SHOWN_ERRORS = 5
_FITTING = "or serve the base that training saved, and set init_lora_weights to true"
_SUBTRACTED = (
    "init_lora_weights {!r}: the adapter belongs to a base from which its first weights were subtracted. With the"
    " adapter as it was before training, save_pretrained(..., path_initial_model_for_weight_conversion=...) in PEFT"
    " makes plain LoRA of it; "
)
# For these, PEFT subtracts the same again when it loads them on the original base. The others start from random numbers
# or from data.
_AGAIN = f"without it, {TO_MODEL}; "
_LOFTQ = (
    "init_lora_weights 'loftq': the adapter makes up for what rounding did to its base, and PEFT has no conversion:"
    " serve the base that training saved, and set init_lora_weights to true"
)


def config_of(files: AdapterFiles) -> AdapterConfig:
    """The configuration of an adapter's files. Raises what parse_config raises."""
    is_gguf_file = files.tensors[: len(MAGIC)] == MAGIC
    return parse_config(read_metadata(files.tensors) if is_gguf_file else files.config)


def config_in(paths: Mapping[str, Path]) -> AdapterConfig | None:
    """The configuration among an adapter's files, given by name; None beside a GGUF file. Raises what parse_config
    raises, and AdapterSourceError if it cannot be read."""
    if CONFIG not in paths:
        return None
    try:
        return parse_config(bytes(read_file(paths[CONFIG], CONFIG)))
    except OSError as error:
        raise AdapterSourceError(f"{CONFIG} cannot be read: {error.strerror}: try again") from error


@lru_cache(maxsize=1)  # while an adapter is read, several ask for its configuration
def parse_config(data: bytes) -> AdapterConfig:
    """Parses and validates the config. Raises AdapterInvalidError, naming the fields that are wrong or not
    supported."""
    try:
        fields: Any = json.loads(data)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise AdapterInvalidError("adapter_config.json: it is not a JSON object")
    if refusal := _refusal(fields):
        raise AdapterInvalidError(f"adapter_config.json: {refusal}")
    try:
        if is_mlx(fields):
            return mlx_config(fields)
        if is_gguf(fields):
            return gguf_config(fields)
        config = KINDS.get(str(fields.get("peft_type")), AdapterConfig).model_validate_json(data)
    except ValidationError as error:
        raise AdapterInvalidError(f"adapter_config.json: {_describe(error)}") from None
    check_config(config)
    return config


def _refusal(fields: dict[str, Any]) -> str:
    """Why adapters of this kind are not served; empty: they are."""
    kind, started = fields.get("peft_type"), fields.get("init_lora_weights")
    if isinstance(kind, str) and kind not in KINDS:
        return f"peft_type {kind[:100]!r} is not served: {way_out(kind)}"
    if kind == "MISS" and fields.get("init_weights") == "bat":
        return f"init_weights 'bat': its product depends on the base's matrix: {way_out(kind)}"
    if not isinstance(started, str):
        return ""
    if started.lower() == "loftq":
        return _LOFTQ
    if re.fullmatch(r"pissa(_niter_\d+)?|olora|corda|lora_ga", started.lower()):
        again = _AGAIN if started.lower() in ("pissa", "olora") else ""
        return _SUBTRACTED.format(started) + again + _FITTING
    return ""


def _describe(error: ValidationError) -> str:
    """The first few errors as "field: reason". The values are left out, since they may be long."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    said = ((".".join(map(str, e["loc"]))[:100], e["msg"].partition(" or instance of ")[0]) for e in errors)
    lines = [": ".join(filter(None, parts)) for parts in said]
    return "; ".join(lines[:_SHOWN_ERRORS])
