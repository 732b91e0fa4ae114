"""A Hugging Face checkpoint directory. Only safetensors are read: unpickling a file would run code from it."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from loraplex_shard.checkpoint.answers import is_of_answers, read_answers
from loraplex_shard.checkpoint.base import CheckpointError, PoolingSpec, TokenizerFiles, errors_of
from loraplex_shard.checkpoint.classifier import classifies, read_classifier, tensors_of_classifier
from loraplex_shard.checkpoint.end_tokens import end_token_ids
from loraplex_shard.checkpoint.pooling import read_pooling
from loraplex_shard.checkpoint.quantized.config import read_layouts
from loraplex_shard.checkpoint.quantized.stored import StoredMatrix
from loraplex_shard.checkpoint.safetensors.files import SafetensorsFiles, read_json
from loraplex_shard.checkpoint.tokenizer_files import read_tokenizer
from loraplex_shard.checkpoint.values import checked
from loraplex_shard.ops.quantized import Float8Matrix, Quantized
from loraplex_shard.sampling.defaults import sampling_defaults
from loraplex_shard.shapes.classifier import Classifier

QUANTIZATION_CONFIGS = "quantization_config", "compression_config"  # the second in old compressed-tensors
GENERATION_CONFIG = "generation_config.json"
MODELOPT_CONFIG = "hf_quant_config.json"
SIZES = frozenset({"hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"})
# Tensors that say how inputs, outputs, keys and values were rounded. They are ignored: nothing of that is rounded here.
OF_ACTIVATIONS = tuple(
    f".{of}_{what}"
    for of in ("input", "output", "k", "v", "kv", "q", "activation")
    for what in ("scale", "zero_point", "global_scale", "scale_ub")
)


class SafetensorsCheckpoint:
    """Raises CheckpointError for a directory without config.json or safetensors, and for files that are cut short."""

    def __init__(self, directory: Path, model_id: str) -> None:
        self.model_id = model_id
        self._directory = directory
        self.config: PreTrainedConfig = self._read_config()
        self.architecture: str = _architecture(self.config)
        self.is_backbone = _backbone(self.config) in (self.config.architectures or ())
        self.classifies = classifies(self.config)
        self._files = SafetensorsFiles(directory, model_id)
        self._matrices = self._find_matrices()
        stored = frozenset(name for matrix in self._matrices.values() for name in matrix.tensors)
        if self._matrices:
            stored |= {name for name in self._files.names if name.endswith(OF_ACTIVATIONS)}
        names = (self._files.names - stored) | self._matrices.keys()
        self._classifier = tensors_of_classifier(names) if self.classifies else frozenset()
        self.names = names - self._classifier

    @property
    def prequantized(self) -> bool:
        return any(matrix.in_integers for matrix in self._matrices.values())

    @property
    def in_float8(self) -> bool:
        return any(matrix.in_float8 for matrix in self._matrices.values())

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        tokenizer = self._tokenizer
        with errors_of(self.model_id):
            return end_token_ids(tokenizer, self._generation_config, self.config)

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        return sampling_defaults(self._generation_config, f"{self.model_id}: {GENERATION_CONFIG}")

    @cached_property
    def known_as(self) -> tuple[str, ...]:
        named = read_json(self._directory / "config.json", self.model_id).get("_name_or_path")
        # The path of a snapshot in the hub's cache contains the model's name.
        return (str(self._directory.resolve()), *([named] if isinstance(named, str) and named else []))

    @cached_property
    def pooling(self) -> PoolingSpec:
        return read_pooling(self._directory, self.model_id)

    def is_rounded(self, name: str) -> bool:
        return name in self._matrices

    def shape(self, name: str) -> tuple[int, ...]:
        matrix = self._matrices.get(name)
        return self._files.shape(name) if matrix is None else matrix.shape

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        matrix = self._matrices.get(name)
        part = self._files.read(name, rows, columns) if matrix is None else matrix.dequantized(rows, columns)
        with errors_of(self.model_id):
            return checked(part, name)

    def read_quantized(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Quantized | None:
        matrix = self._matrices.get(name)
        part = None if matrix is None else matrix.read(rows, columns).quantized()
        if part is not None:
            with errors_of(self.model_id):
                checked(part.scales, name)
                if isinstance(part, Float8Matrix):
                    checked(part.values.float(), name)
        return part

    def tokenizer(self) -> TokenizerFiles:
        tokenizer = self._tokenizer
        templates = tokenizer.chat_template or self._processor_template()
        return TokenizerFiles(
            tokenizer_json=tokenizer.backend_tokenizer.to_str().encode(),
            chat_templates=templates if isinstance(templates, dict) else {"default": templates} if templates else {},
            special_tokens=tokenizer.special_tokens_map,
        )

    def classifier(self) -> Classifier | None:
        with errors_of(self.model_id):
            if self.classifies and is_of_answers(self.config):
                return read_answers(self, self.names, self.config, self._tokenizer)
            return read_classifier(self, self._classifier, self.config) if self.classifies else None

    def _processor_template(self) -> str:
        """The chat template of a model that reads more than text, if its tokenizer does not have one."""
        file = self._directory / "chat_template.json"
        return str(read_json(file, self.model_id).get("chat_template") or "") if file.is_file() else ""

    @cached_property
    def _tokenizer(self) -> Any:
        return read_tokenizer(self._directory, self.model_id, self.config.model_type)

    @cached_property
    def _generation_config(self) -> dict[str, Any]:
        file = self._directory / GENERATION_CONFIG
        return read_json(file, self.model_id) if file.is_file() else {}

    def _read_config(self) -> PreTrainedConfig:
        file = self._directory / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{self.model_id} is not a model's directory: {self._what_it_is()}")
        content = read_json(file, self.model_id)
        if content.get("model_type") not in CONFIG_MAPPING:
            known = f"transformers knows no model_type {content.get('model_type')!r}"
            names = ", ".join(content.get("architectures") or ["its architecture"])
            raise CheckpointError(f"{self.model_id}: {names} is not served: {known}")
        for part in (content, content.get("text_config") or {}):
            for name in sorted(SIZES.intersection(part)):
                if isinstance(part[name], int) and part[name] < 1:
                    raise CheckpointError(f"{self.model_id}: config.json: {name} {part[name]} must be at least 1")
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(self._directory, trust_remote_code=False)
        except Exception as error:  # transformers' classes compute with values of the file and may raise anything
            raise CheckpointError(f"{self.model_id}: config.json: {error}") from error
        return config

    def _what_it_is(self) -> str:
        if (self._directory / "adapter_config.json").is_file():
            return "it holds a LoRA adapter. Give the base model here, and the folder above as --adapters"
        if files := sorted(path.name for path in self._directory.glob("*.gguf")):
            return f"it holds GGUF files. Give the path of one of them: {', '.join(files[:5])}"
        return "there is no config.json"

    def _find_matrices(self) -> dict[str, StoredMatrix]:
        """The matrices in integers or small floats, as config.json or ModelOpt's file beside it says."""
        said = (getattr(self.config, name, None) for name in QUANTIZATION_CONFIGS)
        quantization = next((each for each in said if each is not None), None)
        if quantization is None and (file := self._directory / MODELOPT_CONFIG).is_file():
            quantization = {"quant_method": "modelopt"} | read_json(file, self.model_id).get("quantization", {})
        with errors_of(self.model_id):
            layouts = () if quantization is None else read_layouts(quantization)
            return {name: matrix for layout in layouts for name, matrix in layout.find(self._files).items()}


def _architecture(config: PreTrainedConfig) -> str:
    """The class that generates. config.json may name no class, the class without a head, if it is an embedding model,
    a class that classifies, or another spelling, as the first conversions did (LLaMAForCausalLM,
    Ernie4_5_ForCausalLM)."""
    named: str = (config.architectures or [""])[0]
    generates = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, named or "(none)"))
    is_meant = named in ("", _backbone(config)) or _plain(named) == _plain(generates)
    return generates if is_meant or classifies(config) else named


def _backbone(config: PreTrainedConfig) -> str | None:
    """The class without a head. transformers names Llama 4's whole class in its place."""
    name = str(MODEL_MAPPING_NAMES.get(config.model_type))
    return None if name.endswith("ForConditionalGeneration") else name


def _plain(name: str) -> str:
    return name.lower().replace("_", "")
