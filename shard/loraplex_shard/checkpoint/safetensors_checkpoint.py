"""A Hugging Face checkpoint directory. Only safetensors are read: unpickling a file would run what is in it."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from loraplex_shard.checkpoint.base import CheckpointError, TokenizerFiles
from loraplex_shard.ops.quantized import QuantizedMatrix

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """Raises CheckpointError for a directory without config.json or safetensors, and for files that are cut short."""

    def __init__(self, directory: Path, model_id: str) -> None:
        self.model_id = model_id
        self._directory = directory
        self.config: PreTrainedConfig = self._read_config()
        architectures = self.config.architectures or ["(none)"]
        self.architecture: str = architectures[0]
        self._files = {name: file for file in map(self._open, self._weight_files()) for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        generation = self._directory / "generation_config.json"
        named = self._json(generation).get("eos_token_id") if generation.is_file() else None
        if named is None:
            named = self.config.eos_token_id
        ids = {self._tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
        return tuple(sorted(ids - {None}))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        part = self._files[name].get_slice(name)
        tensor: torch.Tensor = part[rows] if len(part.get_shape()) == 1 else part[rows, columns]
        return tensor

    def read_quantized(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> QuantizedMatrix | None:
        return None

    def tokenizer(self) -> TokenizerFiles:
        tokenizer = self._tokenizer
        template = tokenizer.chat_template or ""
        return TokenizerFiles(
            tokenizer_json=tokenizer.backend_tokenizer.to_str().encode(),
            chat_template=template if isinstance(template, str) else template.get("default", ""),
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
        )

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            tokenizer = AutoTokenizer.from_pretrained(self._directory)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.model_id}: no tokenizer can be read: {error}") from error
        if not getattr(tokenizer, "is_fast", False):
            raise CheckpointError(f"{self.model_id}: its tokenizer cannot be expressed as a tokenizer.json")
        return tokenizer

    def _read_config(self) -> PreTrainedConfig:
        if not (self._directory / "config.json").is_file():
            raise CheckpointError(f"{self.model_id}: no config.json")
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(self._directory)
        except (OSError, ValueError, LookupError, TypeError, StrictDataclassError) as error:
            raise CheckpointError(f"{self.model_id}: config.json: {error}") from error
        return config

    def _weight_files(self) -> list[str]:
        if (self._directory / INDEX_FILE).is_file():
            files = self._json(self._directory / INDEX_FILE).get("weight_map", {}).values()
            return sorted(set(files))
        if (self._directory / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        raise CheckpointError(
            f"{self.model_id}: neither {SINGLE_FILE} nor {INDEX_FILE}. Pickled weights (*.bin, *.pt) are not read; "
            "convert them with transformers: AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
        )

    def _open(self, file: str) -> Any:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{self.model_id}: {INDEX_FILE} names {file!r}: not a safetensors file beside it")
        try:
            return safe_open(self._directory / file, framework="pt")
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.model_id}: {file} is missing") from error
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.model_id}: {file} is not a readable safetensors file: {error}") from error

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{self.model_id}: {path.name} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.model_id}: {path.name} is not a JSON object")
        return content
