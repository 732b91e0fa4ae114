"""A GGUF file as a checkpoint with transformers' configuration and names. Quantized tensors are dequantized when they
are read."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import PreTrainedConfig

from loraplex_shard.checkpoint.base import PoolingSpec, TokenizerFiles, errors_of
from loraplex_shard.checkpoint.gguf.blocks import read_blocks
from loraplex_shard.checkpoint.gguf.configuration import read_config
from loraplex_shard.checkpoint.gguf.file import ByteRows, GgufTensor, floats, read_gguf
from loraplex_shard.checkpoint.gguf.fusion import fused, fused_shape
from loraplex_shard.checkpoint.gguf.names import find_origins
from loraplex_shard.checkpoint.gguf.origins import Origin
from loraplex_shard.checkpoint.gguf.tokenizer import read_end_token_ids, read_tokenizer
from loraplex_shard.checkpoint.values import checked
from loraplex_shard.ops.quantized import QuantizedMatrix
from loraplex_shard.sampling.defaults import sampling_defaults

_NAME_PARTS = tuple(f"general.{part}" for part in ("basename", "size_label", "finetune", "version"))
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


class GgufCheckpoint:
    """Raises CheckpointError for a file that is not GGUF, is cut short, or holds a model of an unknown kind."""

    is_backbone = classifies = False
    in_float8 = False
    prequantized = False  # the operations do not support all blocks, so the default is to dequantize

    def __init__(self, path: Path, model_id: str) -> None:
        self.model_id = model_id
        self._file = read_gguf(path)
        with errors_of(model_id):
            self.config: PreTrainedConfig = read_config(self._file)
        self.architecture = str((self.config.architectures or [""])[0])

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._origins)

    @cached_property
    def _origins(self) -> dict[str, Origin]:
        return find_origins(self._file, self.config)

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
    def pooling(self) -> PoolingSpec:
        return PoolingSpec()

    def is_rounded(self, name: str) -> bool:
        return self._tensor(name).kind not in _FLOATS

    def shape(self, name: str) -> tuple[int, ...]:
        origin, shape = self._origins[name], self._tensor(name).shape
        if origin.fusion is not None:
            return fused_shape(shape, origin.fusion)
        return (1, *shape) if origin.lacks_dimension else shape if origin.expert is None else shape[1:]

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        with errors_of(self.model_id):
            return checked(self._read(name, rows, columns), self._origins[name].tensor)

    def _read(self, name: str, rows: slice, columns: slice) -> torch.Tensor:
        origin, tensor = self._origins[name], self._tensor(name)
        if origin.fusion is not None:
            second = [self._file.tensors[origin.fusion.second]] if origin.fusion.second else []
            return fused([tensor, *second], origin.fusion, rows, columns)
        if len(self.shape(name)) > 1:
            return floats(self._rows(name, rows), tensor.kind)[:, columns]
        vector = floats(tensor.data, tensor.kind)[0]
        if origin.interleaved:
            vector = vector[self._deinterleaved(len(vector))]
        return vector[rows] - 1 if origin.minus_one else vector[rows]

    def read_quantized(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> QuantizedMatrix | None:
        kind = self._tensor(name).kind
        if self._origins[name].fusion is not None:
            return None
        begin, end, _ = columns.indices(self.shape(name)[1])
        weights, size = GGML_QUANT_SIZES[kind]
        if begin % weights or end % weights:
            return None  # the part would cut a block
        part = read_blocks(self._rows(name, rows)[:, begin // weights * size : end // weights * size], kind)
        if part is not None:
            with errors_of(self.model_id):
                checked(part.scales, self._origins[name].tensor)
        return part

    def tokenizer(self) -> TokenizerFiles:
        with errors_of(self.model_id):
            return read_tokenizer(self._file.metadata)

    def classifier(self) -> None:
        return None

    def _tensor(self, name: str) -> GgufTensor:
        return self._file.tensors[self._origins[name].tensor]

    def _rows(self, name: str, rows: slice) -> ByteRows:
        """Returns a matrix's rows as bytes of the file, in transformers' order."""
        origin, data = self._origins[name], self._tensor(name).data
        if origin.expert is not None:
            size = self.shape(name)[0]
            data = data[origin.expert * size : (origin.expert + 1) * size]
        return data[self._deinterleaved(len(data))[rows]] if origin.interleaved else data[rows]

    def _deinterleaved(self, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Returns the place in the file of each row of a q or k projection, in transformers' order.

        GGUF puts the two dimensions that RoPE rotates together side by side; transformers puts all first dimensions
        before all second ones.
        """
        pairs = np.arange(rows).reshape(-1, self.config.head_dim // 2, 2)
        return pairs.swapaxes(1, 2).reshape(rows)
