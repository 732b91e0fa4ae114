"""Linear layers in 4 bits by torch's own product: weights become bfloat16 on their way to the tensor cores, and inputs
are not rounded. It reads all weights once for every 16 tokens, so for many tokens they become floats first, and cuBLAS
multiplies them. Shapes that torch's product does not take are computed by the kernels of quantized.py.

torch has the weights in the order in which tensor cores read them (`_convert_weight_to_int4pack`): tiles of 8 rows and
16 columns, of which each of a warp's 32 threads has four. One number of 32 bits is what a thread has of two tiles side
by side; some of these follow each other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from loraplex_shard.ops.quantized import QuantizedMatrix

ROWS, COLUMNS = 64, 32  # that one program makes floats of; columns of the smallest group
TILE_ROWS, TILE_COLUMNS = 8, 16
TILES = 8, 4, 2  # side by side that a thread reads at once: the more, the better
FEW = 64  # tokens; for more, cuBLAS multiplies
AT_ONCE = 1 << 27  # weights that are floats at the same time
ZERO = 8  # the value that torch's product scales to nothing


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """w = scale * (value - ZERO) + offset."""

    values: torch.Tensor  # [rows / 8, columns / (16 * tiles), 32, tiles / 2] int32
    scales: torch.Tensor  # [groups, rows, 2] bfloat16: scales and offsets
    group: int

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def tiles(self) -> int:
        return 2 * self.values.shape[3]

    @property
    def columns(self) -> int:
        return self.values.shape[1] * TILE_COLUMNS * self.tiles

    def __len__(self) -> int:
        """The number of rows."""
        return self.scales.shape[1]

    def part(self, rows: slice) -> "Int4Weight":
        """Copies the scales, which torch reads in one piece."""
        tiles = slice(rows.start // TILE_ROWS, -(-rows.stop // TILE_ROWS))
        return Int4Weight(self.values[tiles], self.scales[:, rows].contiguous(), self.group)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns the matrix's rows as float32: [indices, columns]."""
        by_row = self.values.view(*self.values.shape[:2], TILE_ROWS, 4, -1)
        threads = by_row[indices // TILE_ROWS, :, indices % TILE_ROWS]
        bit = torch.arange(0, 32, 4, device=indices.device).view(2, 2, 2)  # of neighbours, two tiles, a tile's halves
        numbers = threads[..., None, None, None] >> bit & 15  # [indices, :, thread, pair of tiles, *bit.shape]
        values = numbers.permute(0, 1, 3, 5, 6, 2, 4).reshape(len(indices), -1, self.group)
        scales, offsets = self.scales[:, indices].float().permute(2, 1, 0)[..., None]
        floats: torch.Tensor = (values - ZERO) * scales + offsets
        return floats.flatten(1)


def fits(matrix: QuantizedMatrix, device: torch.device) -> bool:
    """Whether torch's product takes the matrix."""
    rows, columns = matrix.values.shape
    return device.type == "cuda" and matrix.bits == 4 and rows % TILE_ROWS == columns % matrix.group == 0


def pack(matrix: QuantizedMatrix, device: torch.device) -> Int4Weight:
    """Returns the matrix on the device, in the form that torch's product reads. Scales and offsets become bfloat16."""
    assert matrix.offsets is not None
    tiles = next(tiles for tiles in TILES if matrix.values.shape[1] % (TILE_COLUMNS * tiles) == 0)
    values = matrix.values.to(device)
    packed = torch._convert_weight_to_int4pack(values[:, ::2] << 4 | values[:, 1::2], tiles)
    scales, offsets = matrix.scales.to(device).float().T, matrix.offsets.to(device).float().T
    return Int4Weight(packed, torch.stack((scales, offsets + ZERO * scales), 2).bfloat16(), matrix.group)


def linear_int4(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Implements Operations.linear. For few tokens, inputs and results are bfloat16 on their way, whatever the dtype
    is."""
    if len(x) <= FEW:
        out = torch._weight_int4pack_mm(x.bfloat16(), weight.values, weight.group, weight.scales).to(x.dtype)
    else:
        step = max(ROWS, AT_ONCE // weight.columns // ROWS * ROWS)
        starts = range(0, len(weight), step)
        parts = [F.linear(x, _floats(weight, first, first + step, x.dtype)) for first in starts]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out if bias is None else out.add_(bias)


def _floats(weight: Int4Weight, first: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """These rows of the matrix, of which the first is a multiple of ROWS."""
    count, columns = min(stop, len(weight)) - first, weight.columns
    out = torch.empty((count, columns), dtype=dtype, device=weight.values.device)
    _unpack[(triton.cdiv(count, ROWS), columns // COLUMNS)](
        weight.values[first // TILE_ROWS :],
        weight.scales[:, first:],
        out,
        count,
        weight.scales.stride(0),
        N=columns,
        GROUP=weight.group,
        TILES=weight.tiles,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return out


@triton.jit
def _unpack(
    values,
    scales,
    out,
    rows,
    scale_stride,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wanted, tile = row < rows, column // 16
    thread = (row % 8 * 4)[:, None] + (column % 8 // 2)[None, :]
    place = (row // 8 * (N // 16 // TILES))[:, None] + (tile // TILES)[None, :]
    place = (place * 32 + thread) * (TILES // 2) + (tile % TILES // 2)[None, :]
    bit = column % 2 * 16 + tile % 2 * 8 + column % 16 // 8 * 4
    numbers = (tl.load(values + place, wanted[:, None], 0) >> bit[None, :] & 15) - 8
    of_group = scales + tl.program_id(1) * COLUMNS // GROUP * scale_stride + row * 2
    scale = tl.load(of_group, wanted, 0.0).to(tl.float32)
    offset = tl.load(of_group + 1, wanted, 0.0).to(tl.float32)
    floats = numbers.to(tl.float32) * scale[:, None] + offset[:, None]
    tl.store(out + row[:, None] * N + column[None, :], floats.to(out.dtype.element_ty), wanted[:, None])
