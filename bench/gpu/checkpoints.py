"""Models and adapters with random weights, made on the device: real shapes, and nothing to bring along."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any
from zlib import crc32

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from bench.engine.stepping import random_adapter
from bench.gpu.check import DeviceName
from loraplex_shard.checkpoint.base import Checkpoint, PoolingSpec, TokenizerFiles
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.models.loading import load_decoder
from loraplex_shard.ops.cuda.graphs import GraphRecorder
from loraplex_shard.ops.cuda.operations import CudaOperations
from loraplex_shard.ops.quantized import QuantizedMatrix
from loraplex_shard.settings import Quantize
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.shapes.classifier import Classifier
from loraplex_shard.shapes.layout import LinearLayout

# What differs between them: biases, norms of heads, windows.
CLASSES: dict[str, type[PreTrainedConfig]] = {
    "Llama 3 8B": LlamaConfig,
    "Qwen 2.5 7B": Qwen2Config,
    "Qwen 3 8B": Qwen3Config,
    "Mistral 7B": MistralConfig,
}
SIZES: dict[str, dict[str, Any]] = {
    "Llama 3 8B": {"vocab_size": 128_256, "intermediate_size": 14_336, "num_hidden_layers": 32},
    "Qwen 2.5 7B": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "Qwen 3 8B": {"vocab_size": 151_936, "intermediate_size": 12_288, "num_hidden_layers": 36, "head_dim": 128},
    "Mistral 7B": {"vocab_size": 32_000, "intermediate_size": 14_336, "num_hidden_layers": 32},
}
COMMON = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32_768}
TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
TINY_WINDOW = 24


def real(name: str) -> PreTrainedConfig:
    return CLASSES[name](**COMMON | SIZES[name])


def tiny(name: str, **changes: Any) -> PreTrainedConfig:
    """The same class with little of everything."""
    window = {"sliding_window": TINY_WINDOW} if CLASSES[name] is MistralConfig else {}
    return CLASSES[name](**TINY | window | changes)


class RandomCheckpoint(Checkpoint):
    """Normal values, scaled so that those of activations stay near 1. They depend on a tensor's name alone."""

    prequantized = in_float8 = classifies = is_backbone = False
    end_token_ids, known_as, sampling_defaults = (), (), {}
    pooling = PoolingSpec()

    def __init__(self, config: PreTrainedConfig, device: torch.device) -> None:
        self._config, self._device = config, device

    @property
    def model_id(self) -> str:
        return f"random {self.architecture}"

    @property
    def config(self) -> PreTrainedConfig:
        return self._config

    @property
    def architecture(self) -> str:
        kind: Any = AutoModelForCausalLM._model_mapping[type(self._config)]
        return str(kind.__name__)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._config)  # type: ignore[no-untyped-call]
        tensors = model.state_dict()
        if self._config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def is_rounded(self, name: str) -> bool:
        return False

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        generator = torch.Generator(self._device).manual_seed(crc32(name.encode()))
        shape = self._shapes[name]
        tensor: torch.Tensor = torch.randn(shape, generator=generator, device=self._device)
        if len(shape) == 2:
            return tensor[rows, columns] * float(shape[1] ** -0.5)
        return tensor[rows] * 0.2 + name.endswith("norm.weight")

    def read_quantized(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> QuantizedMatrix | None:
        return None

    def tokenizer(self) -> TokenizerFiles:
        return TokenizerFiles(b"{}", {}, {})

    def classifier(self) -> Classifier | None:
        return None


def load(
    config: PreTrainedConfig,
    device: DeviceName,
    dtype: torch.dtype,
    quantize: Quantize = "none",
    max_model_len: int = 512,
    group: Group | None = None,
    ops: CudaOperations | None = None,
) -> Decoder:
    """A decoder with CUDA's operations, as a shard has them; on the CPU, they run in Triton's interpreter."""
    where = torch.device(device)
    form = ParameterForm(dtype, where, quantize)
    checkpoint = RandomCheckpoint(config, where)
    ops = ops or CudaOperations(where, GraphRecorder() if device == "cuda" else None)
    return load_decoder(checkpoint, group or Group(0, 1), ops, form, max_model_len)


def reference(
    config: PreTrainedConfig, device: DeviceName, dtype: torch.dtype, added: Mapping[str, torch.Tensor] | None = None
) -> Any:
    """transformers' model with the same weights. `added`: what an adapter adds to the weights of modules."""
    checkpoint = RandomCheckpoint(config, torch.device(device))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    tensors = {name: checkpoint.read(name) for name in checkpoint.names}
    for module, delta in (added or {}).items():
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + delta
    model.load_state_dict(tensors, strict=not config.tie_word_embeddings)
    return model.to(dtype).eval()


def many_adapters(
    layouts: Sequence[LinearLayout], lora_rank: int, count: int, dtype: torch.dtype, device: DeviceName
) -> list[AdapterWeights]:
    """Adapters on all linear layers but the head, each in memory of its own."""
    template = random_adapter(layouts, lora_rank, 0, dtype)
    memory = template.memory.to(device)
    return [template.at(memory.clone()) for _ in range(count)]
