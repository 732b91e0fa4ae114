"""Linear layers in 4 bits by torch's own product, which only GPUs have: elsewhere, what torch's kernels do thread by
thread takes its place, and refuses what they refuse."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch

from loraplex_shard.ops.cuda import int4
from loraplex_shard.ops.cuda.int4 import FEW, Int4Weight
from loraplex_shard.ops.cuda.operations import CudaOperations
from loraplex_shard.ops.quantized import QuantizedMatrix
from tests.shard.elsewhere import DEVICE, elsewhere
from tests.shard.operations import assert_close, paged_batch, random

CUDA = elsewhere(CudaOperations(DEVICE))
SHAPES = [(256, 32), (192, 64), (96, 32)]  # columns and groups: of eight, four and two tiles side by side
ORDER = 0, 16, 4, 20, 8, 24, 12, 28  # the bits of a thread's eight values
calls: list[tuple[int, ...]] = []


@pytest.fixture(autouse=True)
def torchs_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is used for every matrix, on any device."""
    calls.clear()
    monkeypatch.setattr(int4, "fits", lambda matrix, device: True)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch, "_convert_weight_to_int4pack", convert)
        monkeypatch.setattr(torch, "_weight_int4pack_mm", multiply)


def places(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], int, list[int]]]:
    """For each number of a packed matrix: its place, its row, and the columns of its values."""
    for place in product(*map(range, shape)):
        row_tile, outer, thread, pair = place
        first = (outer * shape[3] + pair) * 32 + thread % 4 * 2
        yield place, row_tile * 8 + thread // 4, [first + column for column in (0, 1, 8, 9, 16, 17, 24, 25)]


def convert(values: torch.Tensor, tiles: int) -> torch.Tensor:
    assert values.dtype == torch.uint8 and values.is_contiguous() and 2 * values.shape[1] % (16 * tiles) == 0
    wide = torch.stack((values >> 4, values & 15), 2).flatten(1).tolist()
    packed = np.zeros((-(-len(values) // 8), 2 * values.shape[1] // (16 * tiles), 32, tiles // 2), np.uint32)
    for place, row, columns in places(packed.shape):
        packed[place] = sum(wide[row][column] << bit for column, bit in zip(columns, ORDER, strict=True))
    return torch.from_numpy(packed.view(np.int32))


def multiply(x: torch.Tensor, values: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    calls.append((len(x), values.shape[3] * 2, group))
    rows, columns = values.shape[0] * 8, x.shape[1]
    assert x.dtype == scales.dtype == torch.bfloat16 and values.dtype == torch.int32
    assert x.is_contiguous() and values.is_contiguous() and scales.is_contiguous()
    assert values.shape[1] == columns // (16 * 2 * values.shape[3]) and values.shape[2] == 32
    assert group in (32, 64, 128, 256) and scales.shape == (columns // group, rows, 2)
    weights, packed, wide = (
        np.empty((rows, columns), np.float32),
        values.numpy().view(np.uint32),
        scales.float().numpy(),
    )
    for place, row, own in places(values.shape):
        for column, bit in zip(own, ORDER, strict=True):
            scale, offset = wide[column // group, row]
            weights[row, column] = ((int(packed[place]) >> bit & 15) - 8) * scale + offset
    return (x.float() @ torch.from_numpy(weights).bfloat16().float().T).bfloat16()


def quantized_matrix(rows: int, columns: int, group: int) -> QuantizedMatrix:
    """With scales and offsets that bfloat16 has, so that nothing but the product is rounded."""
    values = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales = 2.0 ** -torch.arange(rows * columns // group).remainder(3).view(rows, -1) / 8
    return QuantizedMatrix(4, group, values, scales.half(), -(8 * scales).half() + 0.25)


@pytest.mark.parametrize(("columns", "group"), SHAPES)
def test_few_and_many_tokens_are_multiplied_by_the_same_matrix(columns: int, group: int) -> None:
    matrix = quantized_matrix(72, columns, group)
    weight, bias = CUDA.pack(matrix), random(2, 72)
    assert isinstance(weight, Int4Weight) and len(weight) == 72
    for tokens in (1, FEW, FEW + 1):
        x = random(tokens, tokens, columns).bfloat16()
        expected = (x.float() @ matrix.dequantized().T + bias).bfloat16()
        for dtype in (torch.bfloat16, torch.float32):
            assert_close(CUDA.linear(x.to(dtype), weight, bias.to(dtype)).bfloat16(), expected)
    if DEVICE.type == "cpu":
        tiles = {256: 8, 192: 4, 96: 2}[columns]
        assert calls == [(tokens, tiles, group) for tokens in (1, 1, FEW, FEW)], "torch's product is for few tokens"


@pytest.mark.parametrize(("columns", "group"), SHAPES)
def test_a_part_is_the_same_rows_of_the_layer_and_of_the_embedding(columns: int, group: int) -> None:
    matrix = quantized_matrix(40, columns, group)
    packed, x = CUDA.pack(matrix), random(1, 3, columns).bfloat16()
    whole = CUDA.linear(x, packed)
    for rows in (slice(0, 16), slice(16, 40)):
        assert CUDA.linear(x, packed.part(rows)).equal(whole[:, rows])
    batch, _ = paged_batch([(0, 80)], seed=0)
    batch.token_ids.copy_(torch.arange(40).flip(0).repeat(2))
    assert CUDA.embedding(CUDA.prepare(batch), packed, torch.float32).equal(matrix.dequantized().flip(0).repeat(2, 1))


def test_a_large_layer_becomes_floats_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random(0, FEW + 1, 96), CUDA.pack(quantized_matrix(200, 96, 32))
    expected = CUDA.linear(x, weight)
    monkeypatch.setattr(int4, "AT_ONCE", 96 * 70)
    assert_close(CUDA.linear(x, weight), expected)


def test_a_matrix_is_held_once() -> None:
    weight = CUDA.pack(quantized_matrix(72, 256, 32))
    assert weight.nbytes == 72 * 256 // 2 + 72 * 8 * 4, "half a byte for each weight, four bytes for each group"


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "taken"),
    [(64, 96, 4, True), (64, 100, 4, False), (60, 96, 4, False), (64, 128, 8, False)],
)
def test_other_shapes_and_forms_are_left_to_our_kernels(
    rows: int, columns: int, bits: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    groups = -(-columns // 32)
    scales, dtype = torch.ones(rows, groups).half(), torch.uint8 if bits == 4 else torch.int8
    values = torch.zeros(rows, columns, dtype=dtype)
    matrix = QuantizedMatrix(bits, 32, values, scales, scales if bits == 4 else None)
    assert int4.fits(matrix, torch.device("cuda")) == taken
    assert not int4.fits(matrix, torch.device("cpu"))
