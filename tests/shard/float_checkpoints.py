"""Stores matrices in the formats of bitsandbytes, HQQ, float8 and float4 checkpoints, as these are defined, together
with the weights that they represent."""

import json
from collections.abc import Callable
from typing import Any

import torch

from tests.shard.quantized_checkpoints import Store, compressed_tensors

Factors = tuple[dict[str, torch.Tensor], torch.Tensor]
Stored = tuple[dict[str, torch.Tensor], torch.Tensor]

# bitsandbytes' levels for both 4-bit types.
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FP4 = [0.0, 0.0052083, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25]
FP4 += [-value for value in FP4]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
E4M3_MOST, E2M1_MOST = 448, 6


def bitsandbytes_4_bits(kind: str, nested: bool) -> Store:
    def store(matrix: torch.Tensor) -> Stored:
        code = torch.tensor(NF4 if kind == "nf4" else FP4)
        blocks = matrix.reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": [*matrix.shape]}
        stored = {"weight.absmax": absmax, "weight.quant_map": code}
        if nested:
            offset, size, levels = float(absmax.mean()), 256, torch.linspace(-1, 1, 256)
            padded = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % size)).view(-1, size)
            most = padded.abs().amax(1)
            indices = nearest(padded / most[:, None], levels)
            absmax = (levels[indices] * most[:, None]).flatten()[: len(absmax)] + offset
            state |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": offset}
            stored["weight.absmax"] = indices.flatten()[: len(blocks)].to(torch.uint8)
            stored |= {"weight.nested_absmax": most, "weight.nested_quant_map": levels}
        indices = nearest(blocks / absmax[:, None], code)
        flat = indices.flatten()
        stored["weight"] = (flat[::2] << 4 | flat[1::2]).to(torch.uint8)[:, None]
        stored[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode())).to(
            torch.uint8
        )
        return stored, (code[indices] * absmax[:, None]).view(matrix.shape)

    return store


def float8(rows: int | None, columns: int | None, suffix: str, dtype: torch.dtype = torch.float32) -> Store:
    """Stores float8 with one scale per block of this size; None: all rows, or all columns."""

    def store(matrix: torch.Tensor) -> Stored:
        down, across = rows or matrix.shape[0], columns or matrix.shape[1]
        blocks = matrix.unflatten(1, (-1, across)).unflatten(0, (-1, down))
        scales = (blocks.abs().amax((1, 3)) / E4M3_MOST).to(dtype)
        scale_of = scales.float()[:, None, :, None]
        values = (blocks / scale_of).to(torch.float8_e4m3fn)
        weights = (values.float() * scale_of).reshape(matrix.shape)
        scales = scales.flatten() if rows is None and columns is None else scales
        return {"weight": values.reshape(matrix.shape), suffix: scales}, weights

    return store


def float4(values: str, group: int, factors: Callable[[torch.Tensor], Factors]) -> Store:
    """Stores the values under the name `values`. `factors` stores the scales (in float32) by which they are
    multiplied."""

    def store(matrix: torch.Tensor) -> Stored:
        groups = matrix.unflatten(1, (-1, group))
        stored, scales = factors(groups.abs().amax(-1) / E2M1_MOST)
        indices = nearest(groups / scales[:, :, None], E2M1)
        flat = indices.flatten(1)
        packed = (flat[:, ::2] | flat[:, 1::2] << 4).to(torch.uint8)
        return stored | {values: packed}, (E2M1[indices] * scales[:, :, None]).flatten(1)

    return store


def nvidia(scale: torch.Tensor) -> Factors:
    """Stores ModelOpt's NVFP4."""
    of_all = scale.amax() / E4M3_MOST
    rounded = (scale / of_all).to(torch.float8_e4m3fn)
    return {"weight_scale": rounded, "weight_scale_2": of_all}, rounded.float() * of_all


def compressed_nvidia(scale: torch.Tensor) -> Factors:
    stored, scales = nvidia(scale)
    return {"weight_scale": stored["weight_scale"], "weight_global_scale": 1 / stored["weight_scale_2"][None]}, scales


def powers_of_two(scale: torch.Tensor) -> Factors:
    exponents = scale.log2().ceil()
    return {"weight_scale": (exponents + 127).to(torch.uint8)}, exponents.exp2()


def hqq(axis: int) -> Store:
    """Stores 4 bits in groups of 64."""

    def store(matrix: torch.Tensor) -> Stored:
        groups = matrix.reshape(-1, 64) if axis == 1 else matrix.reshape(64, -1)
        low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
        scale = (high - low) / 15
        zero = -low / scale
        values = (groups / scale + zero).round().clamp(0, 15).to(torch.uint8)
        half = len(values) // 2
        stored = {"W_q": values[:half] << 4 | values[half:], "scale": scale, "zero": zero}
        stored |= {"shape": torch.tensor(matrix.shape), "packing": torch.tensor(list(b"4bit_u8")).to(torch.uint8)}
        numbers = {"axis": axis, "group_size": 64, "nbits": 4, "view_as_float": 0, "stores_quant_config": 1}
        return stored | {n: torch.tensor(i) for n, i in numbers.items()}, ((values - zero) * scale).view(matrix.shape)

    return store


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The index of each value's nearest level."""
    ordered, order = levels.sort()
    return order[torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2)]


BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FP8 = compressed_tensors("float-quantized", num_bits=8, type="float")
FORMATS: dict[str, tuple[dict[str, Any], Store]] = {
    "bitsandbytes nf4": (BITSANDBYTES, bitsandbytes_4_bits("nf4", nested=False)),
    "bitsandbytes nf4, double": (BITSANDBYTES, bitsandbytes_4_bits("nf4", nested=True)),
    "bitsandbytes fp4": (BITSANDBYTES, bitsandbytes_4_bits("fp4", nested=False)),
    "DeepSeek's blocks": (
        {"quant_method": "fp8", "weight_block_size": [32, 64]},
        float8(32, 64, "weight_scale_inv", torch.bfloat16),
    ),
    "FBGEMM, by row": ({"quant_method": "fbgemm_fp8"}, float8(1, None, "weight_scale")),
    "float8, one scale": ({"quant_method": "fp8"}, float8(None, None, "weight_scale")),
    "compressed-tensors float8, by row": (FP8, float8(1, None, "weight_scale", torch.bfloat16)),
    "compressed-tensors float8, one scale": (FP8, float8(None, None, "weight_scale")),
    "compressed-tensors NVFP4": (
        compressed_tensors("nvfp4-pack-quantized", num_bits=4, type="float"),
        float4("weight_packed", 16, compressed_nvidia),
    ),
    "compressed-tensors MXFP4": (
        compressed_tensors("mxfp4-pack-quantized", num_bits=4, type="float"),
        float4("weight_packed", 32, powers_of_two),
    ),
    "ModelOpt NVFP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, float4("weight", 16, nvidia)),
    "Quark float8": ({"quant_method": "quark"}, float8(None, None, "weight_scale")),
    "HQQ, rows": ({"quant_method": "hqq"}, hqq(axis=1)),
    "HQQ, columns": ({"quant_method": "hqq"}, hqq(axis=0)),
}
