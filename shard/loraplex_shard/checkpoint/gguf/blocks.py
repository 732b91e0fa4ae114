"""GGUF's blocks of 32 weights as matrices of small integers. The result is exact, except that Q4_K's scales and
offsets, which are products, are rounded to float16."""

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL, Q4_K

from loraplex_shard.checkpoint.gguf.file import ByteRows
from loraplex_shard.ops.quantized import QuantizedMatrix

BITS = {
    GGMLQuantizationType.Q4_0: 4,
    GGMLQuantizationType.Q4_1: 4,
    GGMLQuantizationType.Q4_K: 4,
    GGMLQuantizationType.Q5_0: 8,
    GGMLQuantizationType.IQ4_NL: 8,
    GGMLQuantizationType.Q8_0: 8,
}
GROUP = 32
Blocks = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]  # [rows, blocks, bytes]


def read_blocks(data: ByteRows, kind: GGMLQuantizationType) -> QuantizedMatrix | None:
    """Reads [rows, bytes per row] of the file. Returns None for a kind that does not have this form.

    A block is a float16 scale, in some kinds a float16 offset, and the weights: 32 bytes, or 16 bytes whose low nibbles
    are the first half of the weights. Q4_K puts 8 blocks into one. Their scales and offsets are integers, which are
    multiplied by two float16 numbers.
    """
    if kind not in BITS:
        return None
    blocks = data.reshape(len(data), -1, GGML_QUANT_SIZES[kind][1])
    if kind is GGMLQuantizationType.Q4_K:
        return _k(blocks)
    scales = _halves(blocks[:, :, :2])
    match kind:
        case GGMLQuantizationType.Q4_0:
            return QuantizedMatrix(4, GROUP, _joined(_nibbles(blocks[:, :, 2:])), scales, scales * -8)
        case GGMLQuantizationType.Q4_1:
            return QuantizedMatrix(4, GROUP, _joined(_nibbles(blocks[:, :, 4:])), scales, _halves(blocks[:, :, 2:4]))
        case GGMLQuantizationType.Q5_0:
            highest = np.unpackbits(blocks[:, :, 2:6], axis=2, bitorder="little")
            values = (_nibbles(blocks[:, :, 6:]) | highest << 4).view(np.int8) - np.int8(16)
        case GGMLQuantizationType.IQ4_NL:
            values = np.array(IQ4_NL.kvalues, dtype=np.int8)[_nibbles(blocks[:, :, 2:])]
        case _:
            values = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8)
    return QuantizedMatrix(8, GROUP, _joined(values), scales, None)


def _k(blocks: Blocks) -> QuantizedMatrix:
    rows, count, _ = blocks.shape
    steps, lows = (each.reshape(rows, count, 8) for each in Q4_K.get_scale_min(blocks[:, :, 4:16].reshape(-1, 12)))
    scales = _halves(blocks[:, :, :2])[:, :, None].float() * torch.from_numpy(steps)
    offsets = _halves(blocks[:, :, 2:4])[:, :, None].float() * torch.from_numpy(lows)
    # 32 bytes hold two groups: the first in the low nibbles, the second in the high ones.
    nibbles = _nibbles(blocks[:, :, 16:].reshape(rows, -1, 32))
    return QuantizedMatrix(4, GROUP, _joined(nibbles), scales.flatten(1).half(), -offsets.flatten(1).half())


def _halves(data: Blocks) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data).view(np.float16)[:, :, 0])


def _nibbles(data: Blocks) -> Blocks:
    return np.concatenate((data & 15, data >> 4), axis=2)


def _joined(values: np.ndarray[tuple[int, int, int], np.dtype[np.integer]]) -> torch.Tensor:
    return torch.from_numpy(values).flatten(1)
