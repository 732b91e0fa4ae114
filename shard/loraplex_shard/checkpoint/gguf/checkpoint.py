"""A checkpoint in one GGUF file, seen as if it were a Hugging Face one; quantized tensors are dequantized as read."""

import re
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from transformers import LlamaConfig, PreTrainedConfig

from loraplex_shard.checkpoint.base import CheckpointError, TokenizerFiles
from loraplex_shard.checkpoint.gguf.blocks import read_blocks
from loraplex_shard.checkpoint.gguf.file import ByteRows, read_gguf
from loraplex_shard.checkpoint.gguf.tokenizer import read_end_token_ids, read_tokenizer
from loraplex_shard.checkpoint.sampling_defaults import sampling_defaults
from loraplex_shard.ops.quantized import QuantizedMatrix

ROWS_AT_A_TIME = 32

_NAME_PARTS = tuple(f"general.{part}" for part in ("basename", "size_label", "finetune", "version"))
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)

_WHOLE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_INTERLEAVED = re.compile(r"blk\.\d+\.attn_[qk]\.weight")


class GgufCheckpoint:
    """Raises CheckpointError for a file that is not GGUF, is cut short, or holds anything but a plain Llama."""

    prequantized = False  # some are of blocks that the operations do not know, so they are dequantized unless asked

    def __init__(self, path: Path, model_id: str) -> None:
        self.model_id = model_id
        self.architecture = "LlamaForCausalLM"
        self._file = read_gguf(path)
        self._gguf_names = {_transformers_name(name): name for name in self._file.tensors}
        self.config: PreTrainedConfig = self._read_config()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._gguf_names)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        return read_end_token_ids(self._file.metadata)

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        named = {name: self._file.metadata.get(f"general.sampling.{key}") for name, key in _SAMPLING.items()}
        return sampling_defaults(named, self.model_id)

    @property
    def known_as(self) -> tuple[str, ...]:
        metadata = self._file.metadata
        parts = [str(metadata[key]) for key in _NAME_PARTS if key in metadata]
        return tuple(str(name) for name in (metadata.get("general.name"), "-".join(parts)) if name)

    @property
    def pools_last_token(self) -> bool:
        return False

    def is_rounded(self, name: str) -> bool:
        return self._file.tensors[self._gguf_names[name]].kind not in _FLOATS

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._gguf_names[name]].shape

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        tensor = self._file.tensors[self._gguf_names[name]]
        if len(tensor.shape) == 1:
            return _dequantized(tensor.data, tensor.kind)[0, rows]
        return _dequantized(self._rows(name, rows), tensor.kind)[:, columns]

    def read_quantized(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> QuantizedMatrix | None:
        tensor = self._file.tensors[self._gguf_names[name]]
        begin, end, _ = columns.indices(tensor.shape[1])
        weights, size = GGML_QUANT_SIZES[tensor.kind]
        if begin % weights or end % weights:
            return None  # the cut goes through a block
        data = self._rows(name, rows)[:, begin // weights * size : end // weights * size]
        return read_blocks(data, tensor.kind)

    def _rows(self, name: str, rows: slice) -> ByteRows:
        """A matrix's rows as they lie in the file, in transformers' order."""
        tensor = self._file.tensors[self._gguf_names[name]]
        if _INTERLEAVED.fullmatch(self._gguf_names[name]):
            return tensor.data[self._deinterleaved(tensor.shape[0])[rows]]
        return tensor.data[rows]

    def tokenizer(self) -> TokenizerFiles:
        return read_tokenizer(self._file.metadata)

    def _deinterleaved(self, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """For each row of a q or k projection as transformers has it, its place in the file.

        GGUF pairs the two dimensions that RoPE rotates together, transformers has the first half of them before the
        second.
        """
        pairs = np.arange(rows).reshape(-1, self.config.head_dim // 2, 2)
        return pairs.swapaxes(1, 2).reshape(rows)

    def _read_config(self) -> PreTrainedConfig:
        architecture = self._file.metadata.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{self.model_id}: GGUF architecture {architecture!r} is not served, only 'llama'")
        scaling = self._file.metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise CheckpointError(f"{self.model_id}: llama.rope.scaling.type {scaling!r} is not served in GGUF files")
        heads = self._integer("attention.head_count")
        hidden = self._integer("embedding_length")
        head_dim = self._integer("attention.key_length", hidden // heads)
        rotated = self._integer("rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise CheckpointError(f"{self.model_id}: llama.rope.dimension_count {rotated} is not the head's {head_dim}")
        return LlamaConfig(
            architectures=[self.architecture],
            vocab_size=self.shape("model.embed_tokens.weight")[0],
            hidden_size=hidden,
            intermediate_size=self._integer("feed_forward_length"),
            num_hidden_layers=self._integer("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=self._number("attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": self._number("rope.freq_base", 10000.0)},
            max_position_embeddings=self._integer("context_length"),
            tie_word_embeddings="lm_head.weight" not in self._gguf_names,
        )

    def _integer(self, key: str, default: int | None = None) -> int:
        return int(self._number(key, default))

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._file.metadata.get(f"llama.{key}", default)
        if not isinstance(value, int | float):
            raise CheckpointError(f"{self.model_id}: metadata llama.{key} is missing or not a number")
        return value


def _dequantized(data: ByteRows, kind: GGMLQuantizationType) -> torch.Tensor:
    """[rows, weights of a row] float32."""
    rows = data.shape[0]
    # dequantize() works through a few rows at a time; longer ones, where rows may be joined, are several times faster.
    weights = dequantize(data.reshape(rows // gcd(rows, ROWS_AT_A_TIME), -1), kind)
    # Float32 tensors come as views of the file, which is mapped read-only.
    return torch.from_numpy(weights if weights.flags.writeable else weights.copy()).reshape(rows, -1)


def _transformers_name(name: str) -> str:
    """Unknown names stay as they are: they are then tensors that the model has no use for."""
    if match := _LAYER_TENSOR.fullmatch(name):
        layer, part = match.groups()
        if part in _IN_LAYER:
            return f"model.layers.{layer}.{_IN_LAYER[part]}.weight"
    return _WHOLE_MODEL.get(name, name)
