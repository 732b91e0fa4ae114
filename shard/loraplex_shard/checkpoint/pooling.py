"""Reads how texts become embeddings from the files that sentence-transformers writes beside a model."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from loraplex_shard.checkpoint.base import CheckpointError, PoolingMode, PoolingSpec
from loraplex_shard.checkpoint.safetensors.files import read_json

MODULES = "modules.json"
POOLING_FOLDER = "1_Pooling"
PREFIX = "pooling_mode_"

# By sentence-transformers' names, in both of its formats.
MODES: dict[str, PoolingMode] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "lasttoken": "last",
    "cls": "first",
    "cls_token": "first",
}


def is_matryoshka(config: PreTrainedConfig) -> bool:
    """Whether beginnings of its embeddings are embeddings, too, by vLLM's fields of config.json."""
    return bool(getattr(config, "is_matryoshka", False) or matryoshka_dimensions(config))


def matryoshka_dimensions(config: PreTrainedConfig) -> list[int]:
    """The lengths of such beginnings; none: any."""
    return list(getattr(config, "matryoshka_dimensions", None) or ())


def read_pooling(directory: Path, model_id: str) -> PoolingSpec:
    """The model's pooling, or the default if there are no such files. Raises CheckpointError if they ask for something
    that is not served."""
    folder, normalized = POOLING_FOLDER, True
    if (directory / MODULES).is_file():
        kinds = _modules(directory / MODULES, model_id)
        if unknown := kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
            raise CheckpointError(f"{model_id}: {MODULES}: {', '.join(sorted(unknown))} is not served")
        folder, normalized = kinds.get("Pooling", folder), "Normalize" in kinds
    file = directory / folder / "config.json"
    config = read_json(file, model_id) if file.is_file() else {}
    name = f"{model_id}: {folder}/config.json"
    if config.get("include_prompt", True) is not True:
        raise CheckpointError(f"{name}: include_prompt false is not served: prompts are part of the text here")
    modes = _modes(config)
    if len(modes) > 1 or not modes <= MODES.keys():
        raise CheckpointError(f"{name}: {', '.join(PREFIX + mode for mode in sorted(modes))} is not served")
    return PoolingSpec(MODES[modes.pop()] if modes else "mean", normalized)


def _modules(file: Path, model_id: str) -> dict[str, str]:
    """The folder of each module, by the module's class."""
    try:
        modules = json.loads(file.read_bytes())
        return {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{model_id}: {MODULES} is not a list of modules with a type and a path") from error


def _modes(config: dict[str, Any]) -> set[str]:
    named = config.get("pooling_mode")  # newer versions; older ones have a flag for each mode
    if named is not None:
        return {named} if isinstance(named, str) else set(map(str, named))
    return {key.removeprefix(PREFIX) for key, value in config.items() if key.startswith(PREFIX) and value is True}
