"""Matrices of float8 or float4 with scales. Those that the operations do not support are read as floats."""

from dataclasses import dataclass
from functools import partial

import torch

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.quantized.integers import groups
from loraplex_shard.checkpoint.quantized.stored import Floats, StoredMatrix, as_slice
from loraplex_shard.checkpoint.safetensors.files import SafetensorsFiles
from loraplex_shard.ops.quantized import FLOAT8 as E4M3
from loraplex_shard.ops.quantized import Float8Matrix, QuantizedMatrix

FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
# The suffixes of a float8 tensor's scales. Weights are multiplied by both, although one is called an inverse.
SCALES = "_scale_inv", "_scale"
FLOAT4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # E2M1, by its bits
BYTE = "U8"
EXPONENT_BIAS = 127  # of scales that are powers of two, stored in a byte (E8M0)


@dataclass(frozen=True, slots=True)
class Float8:
    """float8 as DeepSeek, Qwen, FBGEMM, ModelOpt and compressed-tensors store it: under the matrix's own name, with a
    single scale, one for each row, or one for each block of rows and columns."""

    block: tuple[int, int] | None = None  # rows and columns; None: blocks of equal size, one for each scale

    def find(self, files: SafetensorsFiles) -> dict[str, StoredMatrix]:
        found = {}
        for name in files.names:
            if files.dtype(name) not in FLOAT8 or name.endswith(SCALES):
                continue
            scale = next((name + suffix for suffix in SCALES if name + suffix in files.names), None)
            if scale is None:
                raise CheckpointError(f"missing tensor {name}{SCALES[0]} or {name}{SCALES[1]}, the scales of {name}")
            shape = files.shape(name)
            block = self._block(shape, files.shape(scale), scale)
            read = partial(_read_float8, files, name, scale, block)
            by_row = files.dtype(name) == "F8_E4M3" and block[1] == shape[-1]
            tensors = frozenset({name, scale})
            found[name] = StoredMatrix(shape, tensors, in_integers=False, read_part=read, in_float8=by_row)
        return found

    def _block(self, shape: tuple[int, ...], scales: tuple[int, ...], scale: str) -> tuple[int, int]:
        counts, (rows, columns) = _as_matrix(scales), shape[-2:]
        if self.block and counts == (-(-rows // self.block[0]), -(-columns // self.block[1])):
            return self.block
        divisible = 0 not in counts and rows % counts[0] == columns % counts[1] == 0
        # One for all, or for each row or groups of its columns; other blocks have the size that config.json says.
        if divisible and (counts == (1, 1) or counts[0] == rows or (self.block is None and counts[0] > 1)):
            return rows // counts[0], columns // counts[1]
        raise CheckpointError(f"tensor {scale} {list(scales)} does not have the scales of a matrix {list(shape)}")


@dataclass(frozen=True, slots=True)
class Float4:
    """NVFP4 and MXFP4 of ModelOpt and compressed-tensors: two weights in a byte, and a scale for each row and 16 or 32
    columns. There may be one more number for the whole matrix, by which weights are multiplied or divided."""

    def find(self, files: SafetensorsFiles) -> dict[str, StoredMatrix]:
        found = {}
        for name in files.names:
            module, _, suffix = name.rpartition(".")
            scale = f"{module}.weight_scale"
            if suffix not in ("weight", "weight_packed") or files.dtype(name) != BYTE or scale not in files.names:
                continue
            rows, columns = files.shape(name)[0], files.shape(name)[1] * 2
            counts = files.shape(scale)
            if len(counts) != 2 or counts[0] != rows or columns % counts[1]:
                raise CheckpointError(f"tensor {scale} {list(counts)} does not have the scales of {rows} by {columns}")
            others = f"{module}.weight_scale_2", f"{module}.weight_global_scale"
            if files.dtype(scale) != BYTE and files.names.isdisjoint(others):  # NVFP4
                raise CheckpointError(f"missing tensor {others[0]} or {others[1]}, the scale of {name} as a whole")
            tensors = frozenset({name, scale, *others})
            read = partial(_read_float4, files, name, scale, columns // counts[1], *others)
            found[f"{module}.weight"] = StoredMatrix((rows, columns), tensors, in_integers=False, read_part=read)
        return found


@dataclass(frozen=True, slots=True)
class Mxfp4Experts:
    """GPT-OSS's experts. NAME_blocks [experts, rows, groups, 16] and NAME_scales store the tensor NAME, which is
    [experts, columns, rows] in transformers."""

    def find(self, files: SafetensorsFiles) -> dict[str, StoredMatrix]:
        found = {}
        for blocks in files.names:
            name = blocks.removesuffix("_blocks")
            if name == blocks:
                continue
            if len(files.shape(blocks)) != 4:
                raise CheckpointError(f"tensor {blocks} {list(files.shape(blocks))} does not have experts' blocks")
            scales, (experts, rows, count, size) = f"{name}_scales", files.shape(blocks)
            if scales not in files.names or files.shape(scales) != (experts, rows, count):
                raise CheckpointError(f"tensor {scales} is missing or not {[experts, rows, count]}")
            shape, read = (experts, count * size * 2, rows), partial(_read_experts, files, blocks, scales)
            found[name] = StoredMatrix(shape, frozenset({blocks, scales}), in_integers=True, read_part=read)
        return found


@dataclass(frozen=True, slots=True)
class Mxfp4Part:
    """The matrices of some experts. Twice a float4 is an integer, and half a power of two is a valid scale, so nothing
    is rounded."""

    weights: torch.Tensor  # [experts, rows, groups, columns of a group] float32, with float4 values
    factors: torch.Tensor  # [experts, rows, groups] float32
    columns: slice  # columns of the matrices, which are transposed in transformers

    def dequantized(self) -> torch.Tensor:
        weights = self.weights * self.factors[:, :, :, None]
        return weights.flatten(2)[:, :, self.columns].transpose(1, 2)

    def quantized(self) -> QuantizedMatrix | None:
        """For a single expert: [rows, columns]."""
        scales, values = (self.factors[0] / 2).half(), (self.weights[0] * 2).to(torch.int8)
        if len(self.weights) > 1 or not torch.equal(scales.float() * 2, self.factors[0]):
            return None  # a scale does not fit into float16
        whole = QuantizedMatrix(8, values.shape[2], values.flatten(1), scales, None)
        return whole.part(slice(None), self.columns)


@dataclass(frozen=True, slots=True)
class Float8Part:
    weights: torch.Tensor  # [rows, columns] float8, or [experts, rows, columns]
    scales: torch.Tensor  # float32: like the weights, or with a single column that is for all of theirs

    def dequantized(self) -> torch.Tensor:
        return self.weights.float().mul_(self.scales)

    def quantized(self) -> Float8Matrix | None:
        """For a matrix, or for that of a single expert."""
        if (
            self.weights.dtype != E4M3
            or self.scales.shape[-1] > 1
            or len(self.weights.shape[:-2]) * len(self.weights) > 1
        ):
            return None
        rows = self.weights.shape[-2]
        return Float8Matrix(self.weights.view(rows, -1), self.scales.reshape(rows))


def _read_float8(
    files: SafetensorsFiles, name: str, scale: str, block: tuple[int, int], rows: range, columns: range
) -> Float8Part:
    weights = files.read(name, as_slice(rows), as_slice(columns))
    scales = _factors(files, scale)
    if weights.ndim > 2:  # the part is of experts and rows; each expert has its own scales
        scales = scales.view(-1, *_as_matrix(files.shape(scale)))[as_slice(rows)]
        rows, columns = columns, range(weights.shape[-1])
    else:
        scales = scales.view(_as_matrix(files.shape(scale)))
    down, across = torch.tensor(rows) // block[0], torch.tensor(columns) // block[1]
    return Float8Part(weights, scales[..., down, :][..., across[:1] if across[0] == across[-1] else across])


def _read_float4(
    files: SafetensorsFiles,
    name: str,
    scale: str,
    group: int,
    factor: str,
    divisor: str,
    rows: range,
    columns: range,
) -> Floats:
    packed = files.read(name, as_slice(rows), groups(columns, 2))
    first = columns.start % 2
    weights = _float4(packed)[:, first : first + len(columns)]
    scales = _factors(files, scale, as_slice(rows), groups(columns, group))
    if factor in files.names:
        scales = scales * files.read(factor).float()
    if divisor in files.names:
        scales = scales / files.read(divisor).float()
    return Floats(weights.mul_(scales[:, torch.tensor(columns) // group - columns.start // group]))


def _read_experts(files: SafetensorsFiles, blocks: str, scales: str, experts: range, columns: range) -> Mxfp4Part:
    weights = _float4(files.read(blocks, as_slice(experts)).flatten(0, 2))
    weights = weights.view(len(experts), *files.shape(blocks)[1:3], -1)
    return Mxfp4Part(weights, _factors(files, scales, as_slice(experts)), as_slice(columns))


def _factors(
    files: SafetensorsFiles, name: str, rows: slice = slice(None), columns: slice = slice(None)
) -> torch.Tensor:
    factors = files.read(name, rows, columns)
    return (factors.float() - EXPONENT_BIAS).exp2() if factors.dtype == torch.uint8 else factors.float()


def _float4(packed: torch.Tensor) -> torch.Tensor:
    """[n, bytes] -> [n, bytes * 2]; the low half of a byte comes first."""
    return FLOAT4[torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).int()]


def _as_matrix(scales: tuple[int, ...]) -> tuple[int, int]:
    """The numbers of scales down and across. Scales of rows may be a vector."""
    return (scales[-2], scales[-1]) if len(scales) > 1 else ((*scales, 1)[0], 1)
