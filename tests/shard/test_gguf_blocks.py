"""GGUF's blocks are exactly represented as matrices of small integers: whole, in slices, and over ranks."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_shard.checkpoint import Checkpoint, open_checkpoint
from loraplex_shard.checkpoint.gguf.blocks import BITS, read_blocks
from loraplex_shard.device.parallel import Group
from tests.shard.decoders import load
from tests.shard.gguf_models import random_tensors, write_gguf

Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


EXACT = [kind for kind in BITS if kind is not Kind.Q4_K]
ROUNDED = 2**-10  # relative error of a product that is rounded to float16


def quantized(shape: tuple[int, ...], kind: Kind, scale: float, seed: int) -> np.ndarray:
    if kind in (Kind.Q4_K, Kind.IQ4_NL):  # gguf reads these, but does not write them
        return random_blocks(shape, kind, scale, seed)
    values = np.random.default_rng(seed).normal(0.0, scale, shape).astype(np.float32)
    return gguf.quants.quantize(values, kind)


def random_blocks(shape: tuple[int, ...], kind: Kind, scale: float, seed: int) -> np.ndarray:
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (shape[0], shape[1] // weights, size), dtype=np.uint8)
    data[:, :, :2] = np.float16([scale / 100]).view(np.uint8)
    if kind is Kind.Q4_K:
        data[:, :, :4] = np.float16([scale / 500, scale / 100]).view(np.uint8)
    return data.reshape(shape[0], -1)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from([*BITS]),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_blocks_equal_the_weights_that_gguf_reads(kind: Kind, rows: int, blocks: int, scale: float, seed: int) -> None:
    data = quantized((rows, blocks * gguf.GGML_QUANT_SIZES[kind][0]), kind, scale, seed)
    matrix = read_blocks(data, kind)
    assert matrix is not None
    assert (matrix.bits, matrix.group) == (BITS[kind], 32)
    expected = torch.from_numpy(gguf.quants.dequantize(data, kind))
    if kind in EXACT:
        assert torch.equal(matrix.dequantized(), expected)
    else:
        offsets, scales = matrix.offsets.float().abs().max(), matrix.scales.float().max()
        bound = float(offsets + 15 * scales) * ROUNDED
        torch.testing.assert_close(matrix.dequantized(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", [Kind.Q5_1, Kind.F16, Kind.F32])
def test_other_kinds_are_not_integer_blocks(kind: Kind) -> None:
    assert read_blocks(quantized((2, 64), kind, 1.0, 0).view(np.uint8), kind) is None


@pytest.fixture(scope="module", params=EXACT, ids=lambda kind: kind.name)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices all have one kind, except for an embedding in Q8_0."""
    tensors = random_tensors()
    for seed, (name, (data, kind)) in enumerate(tensors.items()):
        if "norm" not in name:
            matrix = gguf.quants.dequantize(data, kind)
            chosen = Kind.Q8_0 if name == "token_embd.weight" else request.param
            tensors[name] = quantized(matrix.shape, chosen, 0.2, seed), chosen
    del tensors["output.weight"]
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", tensors)


@pytest.fixture
def checkpoint(path: Path) -> Checkpoint:
    return open_checkpoint(str(path))


@pytest.mark.parametrize("name", [Q, DOWN])
@pytest.mark.parametrize("rows", [slice(None), slice(16, 48)])
@pytest.mark.parametrize("columns", [slice(None), slice(32, 64), slice(32, None)])
def test_a_slice_of_the_blocks_equals_the_slice_of_the_matrix(
    checkpoint: Checkpoint, name: str, rows: slice, columns: slice
) -> None:
    matrix = checkpoint.read_quantized(name, rows, columns)
    assert matrix is not None
    assert torch.equal(matrix.dequantized(), checkpoint.read(name, rows, columns))


@pytest.mark.parametrize("columns", [slice(16, 64), slice(0, 33)])
def test_a_slice_through_a_block_is_not_integer_blocks(checkpoint: Checkpoint, columns: slice) -> None:
    assert checkpoint.read_quantized(DOWN, columns=columns) is None


def test_a_model_quantized_to_its_files_bits_has_exactly_the_files_weights(path: Path) -> None:
    bits = open_checkpoint(str(path)).read_quantized(Q).bits
    exact, kept = load(path, max_model_len=32), load(path, max_model_len=32, quantize=f"int{bits}")
    for name in ("qkv", "o"):
        expected, actual = (getattr(decoder.layers[0].attention, name).weight for decoder in (exact, kept))
        assert actual.group == 32
        assert torch.equal(actual.matrix, expected.matrix)
    assert torch.equal(kept.embedding.weight.matrix, exact.embedding.weight.matrix)
    assert kept.embedding.weight.group == 32


def test_ranks_have_exactly_the_files_weights_unless_a_partition_divides_a_block(path: Path) -> None:
    bits = open_checkpoint(str(path)).read_quantized(Q).bits
    ranks = [load(path, group=Group(rank, 2), max_model_len=32, quantize=f"int{bits}") for rank in range(2)]
    exact = load(path, max_model_len=32).layers[0]
    o = torch.cat([rank.layers[0].attention.o.weight.matrix for rank in ranks], dim=1)
    assert torch.equal(o, exact.attention.o.weight.matrix)
    # Of 96 MLP units, each rank has 48, which is one block and a half, so they are quantized again.
    down = torch.cat([rank.layers[0].mlp.down.weight.matrix for rank in ranks], dim=1)
    assert not torch.equal(down, exact.mlp.down.weight.matrix)
    torch.testing.assert_close(down, exact.mlp.down.weight.matrix, rtol=0, atol=0.06)
