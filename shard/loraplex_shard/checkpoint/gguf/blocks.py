"""GGUF's blocks of 32 weights as matrices of small integers, without rounding anything (Q4_0, Q4_1 and Q8_0)."""

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from loraplex_shard.checkpoint.gguf.file import ByteRows
from loraplex_shard.ops.quantized import QuantizedMatrix

KINDS = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0)


def read_blocks(data: ByteRows, kind: GGMLQuantizationType) -> QuantizedMatrix | None:
    """[rows, bytes of a row] as they lie in the file; None for a kind that is not of this form.

    A block is a float16 scale, for Q4_1 a float16 offset, and its weights: 32 bytes, or 16 bytes whose low nibbles
    are the first half of them.
    """
    if kind not in KINDS:
        return None
    weights, size = GGML_QUANT_SIZES[kind]
    blocks = data.reshape(len(data), -1, size)
    scales = _halves(blocks[:, :, :2])
    if kind is GGMLQuantizationType.Q8_0:
        values = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8)
        return QuantizedMatrix(8, weights, torch.from_numpy(values).flatten(1), scales, None)
    if kind is GGMLQuantizationType.Q4_0:
        return QuantizedMatrix(4, weights, _nibbles(blocks[:, :, 2:]), scales, scales * -8)
    return QuantizedMatrix(4, weights, _nibbles(blocks[:, :, 4:]), scales, _halves(blocks[:, :, 2:4]))


def _halves(data: np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data).view(np.float16)[:, :, 0])


def _nibbles(data: np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate((data & 15, data >> 4), axis=2)).flatten(1)
