"""The CUDA operations compute the same as the reference, in Triton's interpreter or, by `bench.gpu`, on a GPU.

The interpreter cannot multiply bfloat16, so products are tested there in float16 and float32; the kernels are the same.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig
from triton.runtime import interpreter

from loraplex_shard.lora.weights.deltas import Delta, partition_adapter
from loraplex_shard.ops.base import Activation, HeadNorms, Norm
from loraplex_shard.ops.cuda import quantized
from loraplex_shard.ops.cuda.attention import attention
from loraplex_shard.ops.cuda.lora import LoraTiles, add_lora_delta
from loraplex_shard.ops.cuda.operations import CudaOperations
from loraplex_shard.ops.cuda.tiles import make_tiles
from loraplex_shard.ops.cuda.worklists import Worklist
from loraplex_shard.ops.quantized import FLOAT8, quantize, to_float8
from loraplex_shard.ops.reference import ReferenceOperations
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.shapes.batch import Segment
from loraplex_shard.shapes.cache import SCALED
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import LinearLayout, LinearPart
from tests.shard.decoders import Sequences, adapter_for, load, save_checkpoint
from tests.shard.elsewhere import DEVICE, elsewhere
from tests.shard.operations import angles, assert_close, cached, filled_cache, paged_batch, random
from tests.shard.test_lora_vocabulary import BASES, VOCAB, compute, make_adapter

CPU = torch.device("cpu")
REFERENCE = ReferenceOperations()
CUDA = elsewhere(CudaOperations(DEVICE))
FLOATS = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else []))
few = settings(deadline=None, max_examples=6)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 100, 1300])
@pytest.mark.parametrize("centered", [False, True])
def test_norms(n: int, dtype: torch.dtype, centered: bool) -> None:
    hidden, delta = random(0, 2, 4, n, dtype=dtype)
    norm = Norm(random(1, n), random(2, n) if centered else None, 1e-2, centered)
    expected_hidden = hidden.clone()
    assert_close(CUDA.norm(hidden, norm), REFERENCE.norm(hidden, norm))
    assert_close(CUDA.add_norm(hidden, delta, 0.3, norm), REFERENCE.add_norm(expected_hidden, delta, 0.3, norm))
    assert_close(hidden, expected_hidden)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
@pytest.mark.parametrize("function", get_args(Activation))
def test_activations(function: Activation, dtype: torch.dtype) -> None:
    for n in (1, 1300):
        x = random(1, 3, 2 * n, dtype=dtype) * 3
        for gated in (True, False):
            assert_close(CUDA.activate(x, function, gated), REFERENCE.activate(x, function, gated))


@pytest.mark.parametrize("ops", [CUDA, REFERENCE], ids=["cuda", "reference"])
def test_large_logits_in_float16_are_finite(ops: CudaOperations | ReferenceOperations) -> None:
    """Their sum overflows float16."""
    x = torch.full((2, 128_256), 1.0, dtype=torch.float16)
    x[1, 7] = torch.inf
    wide, finite = ops.upcast(x)
    assert wide.equal(x.float()) and finite.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
def test_logits_and_which_of_their_rows_are_finite(dtype: torch.dtype) -> None:
    x = random(0, 5, 2500, dtype=dtype) * 5
    for row, column, wrong in ((1, 0, torch.nan), (2, 1023, torch.inf), (4, 2499, -torch.inf)):
        x[row, column] = wrong
    for cap in (0.0, 2.0):
        (actual, finite), (expected, expected_finite) = (ops.upcast(x, 3.0, cap) for ops in (CUDA, REFERENCE))
        assert finite.equal(expected_finite) and finite.tolist() == [True, False, False, True, False]
        assert_close(actual[finite], expected[finite])
    assert CUDA.upcast(x, width=2503)[0][:, 2500:].isneginf().all()


@few
@given(
    tokens=st.sampled_from([1, 16, 17, 65]),
    features=st.tuples(st.integers(1, 140), st.integers(1, 70)),
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_a_quantized_linear_layer_of_any_shape(
    tokens: int, features: tuple[int, int], bits: int, dtype: torch.dtype, seed: int
) -> None:
    x = random(seed, tokens, features[0], dtype=dtype)
    matrix = quantize(random(seed + 1, *features[::-1]), bits)
    bias = random(seed + 2, features[1], dtype=dtype) if seed % 2 else None
    weight = quantized.pack(matrix, DEVICE)
    actual, expected = CUDA.linear(x, weight, bias), REFERENCE.linear(x, REFERENCE.pack(matrix), bias)
    assert_close(actual, expected, factor=2)


def test_a_large_quantized_layer_becomes_floats_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix = random(0, 65, 128), quantize(random(1, 100, 128), 4)
    expected = CUDA.linear(x, CUDA.pack(matrix))
    monkeypatch.setattr(quantized, "AT_ONCE", 128 * 40)
    assert_close(CUDA.linear(x, CUDA.pack(matrix)), expected)


@pytest.fixture
def rounding_to_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter makes 4 of 7.9: it loses what is carried to the exponent."""
    original = interpreter._convert_float

    def convert(numbers: NDArray[Any], given: Any, wanted: Any, mode: Any) -> NDArray[Any]:
        if not wanted.is_fp8e4nv():
            return original(numbers, given, wanted, mode)
        return torch.from_numpy(numbers).to(FLOAT8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.mark.usefixtures("rounding_to_float8")
@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 16, 32), (17, 48, 5008)])
def test_a_linear_layer_in_float8(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Its result has the precision of bfloat16, whatever the dtype is."""
    x, bias = random(0, tokens, columns, dtype=dtype), random(2, rows, dtype=dtype)
    x[0] = 0
    matrix = to_float8(random(1, rows, columns))
    for each in (None, bias):
        actual, expected = CUDA.linear(x, CUDA.pack(matrix), each), REFERENCE.linear(x, REFERENCE.pack(matrix), each)
        assert actual.dtype == dtype
        assert_close(actual.bfloat16(), expected.bfloat16())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.usefixtures("rounding_to_float8")
def test_a_token_that_is_not_finite_does_not_hurt_its_neighbours_in_float8() -> None:
    x, weight = random(0, 3, 32), CUDA.pack(to_float8(random(1, 16, 32)))
    expected = CUDA.linear(x, weight)
    x[0, 3], x[2, 4] = torch.nan, torch.inf
    actual = CUDA.linear(x, weight)
    assert actual[1].equal(expected[1]) and actual.isfinite().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_part_of_a_weight_is_the_same_rows_of_the_layer_and_of_the_embedding(bits: int | None) -> None:
    x, matrix = random(0, 3, 100), random(1, 50, 100)
    weight = matrix if bits is None else quantize(matrix, bits)
    packed = CUDA.pack(weight)
    whole = CUDA.linear(x, packed)
    for rows in (slice(0, 16), slice(16, 48), slice(32, 50)):
        assert_close(CUDA.linear(x, packed.part(rows)), whole[:, rows])
        assert packed.part(rows).nbytes < packed.nbytes
    batch, _ = paged_batch([(0, 100)], seed=0)
    batch.token_ids.copy_(torch.arange(50).flip(0).repeat(2))
    actual = CUDA.embedding(CUDA.prepare(batch), packed, torch.float16)
    expected = REFERENCE.embedding(REFERENCE.prepare(batch), REFERENCE.pack(weight), torch.float16)
    assert_close(actual, expected)
    assert actual.is_contiguous()


MIXED = [(30, 1), (700, 1), (0, 9), (513, 2), (10, 40)]


@pytest.mark.parametrize(
    ("heads", "chunks", "form"),
    [
        (Heads(query=1, kv=1, dim=64), [(0, 1), (0, 512), (17, 1)], torch.float16),
        (Heads(query=4, kv=2, dim=64), [(511, 1), (512, 1), (1023, 2)], torch.float32),
        (Heads(query=9, kv=3, dim=64), MIXED, torch.float16),
        (Heads(query=4, kv=1, dim=96, window=37), MIXED, torch.float16),
        (Heads(query=4, kv=1, dim=96, window=37), MIXED, torch.int8),
        (Heads(query=4, kv=1, dim=96, window=37), MIXED, FLOAT8),
        (Heads(query=5, kv=1, dim=128, soft_cap=3.0), MIXED, torch.float32),
        (Heads(query=8, kv=1, dim=256, window=600, soft_cap=3.0), MIXED, torch.float16),
        (Heads(query=8, kv=1, dim=256, window=600, soft_cap=3.0), MIXED, torch.int8),
        (Heads(query=6, kv=1, dim=80), [(5, 1), (14, 3)], torch.float32),
        (Heads(query=7, kv=1, dim=8), [(5, 1), (14, 3)], torch.int8),
        (Heads(query=2, kv=1, dim=512), [(5, 1), (40, 3)], torch.float32),
        (Heads(query=4, kv=2, dim=48, value_dim=32, scale=0.3), MIXED, torch.float32),
        (Heads(query=4, kv=1, dim=16, value_dim=33), MIXED, torch.int8),
    ],
)
def test_attention_over_any_mix_of_chunks(heads: Heads, chunks: list[tuple[int, int]], form: torch.dtype) -> None:
    dtype = torch.float32 if form in SCALED else form
    batch, num_blocks = paged_batch(chunks, seed=heads.dim)
    (layer,) = filled_cache(num_blocks, heads, form, 1, positions_first=True).layers
    qkv = random(2, batch.starts[-1], heads.width, dtype=dtype)
    for sinks in (None, random(3, heads.query) * 3):
        actual = CUDA.attention(qkv, heads, CUDA.prepare(batch), layer, sinks)
        assert_close(actual, REFERENCE.attention(qkv, heads, REFERENCE.prepare(batch), layer, sinks), factor=2)


def test_small_probabilities_times_small_scales_do_not_underflow_in_float16() -> None:
    """An int8 cache with small values, in which each position's probability is far below the largest one."""
    heads = Heads(query=1, kv=1, dim=16)
    batch, num_blocks = paged_batch([(400, 1)], seed=0)
    (layer,) = filled_cache(num_blocks, heads, torch.int8, 0, positions_first=True).layers
    assert layer.value_scales is not None
    layer.value_scales.mul_(1e-5)
    qkv = random(0, 1, 48, dtype=torch.float16) * 3
    actual = CUDA.attention(qkv, heads, CUDA.prepare(batch), layer)
    expected = REFERENCE.attention(qkv.float(), heads, REFERENCE.prepare(batch), layer)
    error = (actual.float() - expected).abs().max() / expected.abs().max()
    assert error < 0.02


def test_memory_after_a_sequence_in_its_last_block_is_never_read() -> None:
    heads = Heads(query=2, kv=1, dim=16)
    batch, num_blocks = paged_batch([(5, 1), (16, 3)], seed=0)
    (layer,) = filled_cache(num_blocks, heads, torch.float32, 0, positions_first=True).layers
    qkv = random(0, 4, 64)
    expected = CUDA.attention(qkv, heads, CUDA.prepare(batch), layer)
    for row, context in enumerate(batch.context_lengths):
        last = batch.block_tables[row, (context - 1) // 16]
        layer.keys[last, :, :, (context - 1) % 16 + 1 :] = torch.nan
        layer.values[last, :, (context - 1) % 16 + 1 :] = torch.nan
    assert CUDA.attention(qkv, heads, CUDA.prepare(batch), layer).equal(expected)


def test_a_sequences_attention_does_not_depend_on_its_neighbours() -> None:
    heads = Heads(query=6, kv=2, dim=64)
    chunks = [(1500, 1), (30, 9), (40, 1)]
    together, num_blocks = paged_batch(chunks, seed=0)
    (layer,) = filled_cache(num_blocks, heads, torch.float32, 0, positions_first=True).layers
    qkv = random(0, 11, 640)
    out = CUDA.attention(qkv, heads, CUDA.prepare(together), layer)
    alone, _ = paged_batch(chunks[:1], seed=0)
    alone.block_tables.copy_(together.block_tables[:1])
    assert CUDA.attention(qkv[:1].clone(), heads, CUDA.prepare(alone), layer).equal(out[:1])


def test_attention_with_room_for_more_tiles_computes_those_of_the_lists() -> None:
    """As a recorded launch does, whose lists are written anew for each step."""
    heads = Heads(query=6, kv=2, dim=32)
    batch, num_blocks = paged_batch([(1500, 1), (30, 9), (40, 1), (1200, 2)], seed=0)
    (layer,) = filled_cache(num_blocks, heads, torch.float32, 0, positions_first=True).layers
    qkv = random(0, 13, heads.width)
    exact = make_tiles(batch, heads, torch.float32, CPU)
    roomy = replace(exact, **{name: with_room(getattr(exact, name), 40) for name in ("short", "long", "split")})
    attend = elsewhere(attention)
    actual = attend(qkv, heads, batch, replace(roomy, partials=99), layer, None)
    assert actual.equal(attend(qkv, heads, batch, exact, layer, None))


def with_room(worklist: Worklist, room: int) -> Worklist:
    """The same list, with entries that nothing may read behind it."""
    entries = worklist.entries.new_full((room, worklist.entries.shape[1]), 1 << 30)
    entries[: worklist.room] = worklist.entries
    return Worklist(entries, worklist.count)


@pytest.mark.usefixtures("rounding_to_float8")
@pytest.mark.parametrize("form", [*FLOATS, torch.bfloat16, torch.int8, FLOAT8])
@pytest.mark.parametrize(
    ("heads", "norm", "rotary_dim", "interleaved"),
    [
        (Heads(query=3, kv=1, dim=64), False, 64, False),
        (Heads(query=4, kv=2, dim=96), True, 96, True),
        (Heads(query=1, kv=1, dim=6), True, 2, False),
        (Heads(query=2, kv=1, dim=24, value_dim=9), False, 16, True),
        (Heads(query=2, kv=1, dim=24, value_dim=40), True, 0, False),
    ],
)
def test_rotation_and_writing_to_the_cache(
    heads: Heads, norm: bool, rotary_dim: int, interleaved: bool, form: torch.dtype
) -> None:
    dtype = torch.float32 if form in SCALED else form
    batch, num_blocks = paged_batch([(5, 1), (14, 3), (0, 2)], seed=0)
    qkv = random(0, batch.starts[-1], heads.width, dtype=dtype)
    squares = CUDA.head_squares(qkv, heads, 0.1, 0.2) if interleaved else None
    if squares is not None:
        torch.testing.assert_close(squares, REFERENCE.head_squares(qkv, heads, 0.1, 0.2))
    norms = HeadNorms(random(1, heads.query + heads.kv, heads.dim), 1e-6, squares) if norm else None
    rotary = angles(20, rotary_dim, interleaved) if rotary_dim else None
    if rotary and norm:
        rotary = replace(rotary, query_scale=random(4, 20))
    results = []
    for ops in (CUDA, REFERENCE):
        mine = qkv.clone()
        (layer,) = filled_cache(num_blocks, heads, form, 0, positions_first=True).layers
        ops.rotate_and_write(mine, heads, norms, rotary, ops.prepare(batch), layer)
        results.append((mine, *cached(layer)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, factor=2000 if form in SCALED else 2)


@few
@given(
    lora_ranks=st.lists(st.tuples(*[st.none() | st.integers(1, 40)] * 3).filter(any), min_size=1, max_size=4),
    runs=st.lists(
        st.tuples(st.integers(1, 7) | st.just(90) | st.just(200), st.none() | st.integers(0, 3)), min_size=1, max_size=5
    ),
    dtype=st.sampled_from(FLOATS),
    int8=st.booleans(),
    in_features=st.integers(1, 70) | st.just(1100),
    sizes=st.sampled_from([(200, 30, 17), (208, 32, 16)]),
    seed=st.integers(0, 99),
)
def test_lora_deltas_of_mixed_ranks(
    lora_ranks: list[tuple[int | None, ...]],
    runs: list[tuple[int, int | None]],
    dtype: torch.dtype,
    int8: bool,
    in_features: int,
    sizes: tuple[int, ...],
    seed: int,
) -> None:
    parts = tuple(LinearPart(f"p{i}", size, (slice(0, size),)) for i, size in enumerate(sizes))
    layouts = [
        LinearLayout("other", 0, parts[:1], in_features, slice(0, in_features)),
        LinearLayout("fused", 1, parts, in_features, slice(0, in_features)),
    ]
    adapters = []
    for i, ranks in enumerate(lora_ranks):
        deltas = {
            f"p{j}": Delta(
                random(seed + i, r, in_features),
                random(seed + j, sizes[j], r),
                in_features**-0.5,
                gain=random(seed, sizes[j]) if r % 3 else None,
                shift=random(seed, sizes[j]) if r % 2 else None,
            )
            for j, r in enumerate(ranks)
            if r
        }
        adapters.append(partition_adapter(deltas, layouts, torch.int8 if int8 else dtype).weights)
    segments, start = [], 0
    for length, choice in runs:
        if choice is not None:
            segments.append(Segment(start, start + length, adapters[choice % len(adapters)]))
        start += length
    x, base = random(seed, start, in_features, dtype=dtype), random(seed + 5, start, sum(sizes), dtype=dtype)
    actual, expected = base.clone(), base.float()
    CUDA.add_lora_delta(actual, x, tuple(segments), layouts[1])
    REFERENCE.add_lora_delta(expected, x.float(), tuple(segments), layouts[1])
    assert_close(actual, expected.to(dtype), factor=4)


def lora_layer(seed: int, lora_rank: int, in_features: int = 1100) -> tuple[AdapterWeights, LinearLayout]:
    """An int8 adapter of a layer with two projections."""
    parts = tuple(LinearPart(name, 32, (slice(0, 32),)) for name in "ab")
    layout = LinearLayout("fused", 0, parts, in_features, slice(0, in_features))
    deltas = {p.module: Delta(random(seed, lora_rank, in_features), random(seed, 32, lora_rank), 0.1) for p in parts}
    return partition_adapter(deltas, [layout], torch.int8).weights, layout


def test_a_tokens_lora_delta_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many tiles, a program computes all slices of A's columns; with few, each slice has a program."""
    # The interpreter's products are of numpy's BLAS, which on some processors depend on a row's place.
    monkeypatch.setattr(np, "matmul", partial(np.einsum, "ij,jk->ik"))
    (adapter, layout), (other, _) = lora_layer(0, 20), lora_layer(1, 3)
    x, base = random(0, 80, 1100), random(1, 80, 64)
    together, alone, few_others = base.clone(), base[40:41].clone(), base[38:42].clone()
    CUDA.add_lora_delta(together, x, (Segment(0, 30, other), Segment(30, 77, adapter), Segment(77, 80, other)), layout)
    CUDA.add_lora_delta(alone, x[40:41].clone(), (Segment(0, 1, adapter),), layout)
    CUDA.add_lora_delta(few_others, x[38:42].clone(), (Segment(0, 1, other), Segment(2, 3, adapter)), layout)
    assert alone.equal(together[40:41]) and few_others[2:3].equal(alone) and not alone.equal(base[40:41])


def test_a_launch_with_room_for_more_tiles_computes_those_of_the_list() -> None:
    """As a recorded launch does, whose list is written anew for each step."""
    adapter, layout = lora_layer(0, 20)
    x, base = random(0, 40, 1100), random(1, 40, 64)
    there = adapter.at(adapter.memory.to(DEVICE))
    tiles = LoraTiles.of((Segment(3, 38, there),), CPU)
    actual, expected = base.clone(), base.clone()
    elsewhere(add_lora_delta)(actual, x, replace(tiles, tiles=with_room(tiles.tiles, 9), widest=100), layout)
    CUDA.add_lora_delta(expected, x, (Segment(3, 38, adapter),), layout)
    assert actual.equal(expected) and not actual.equal(base)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "n", "k"), [(1, 5, 70, 33), (9, 3, 64, 128), (70, 2, 30, 90)])
def test_a_linear_layer_of_each_expert(
    tokens: int, experts: int, n: int, k: int, biased: bool, dtype: torch.dtype
) -> None:
    routing = REFERENCE.route(random(0, tokens, experts), 2, normalized=True)
    matrices = [random(expert, n, k, dtype=dtype) for expert in range(experts)]
    biases = [random(9 + expert, n, dtype=dtype) if biased else None for expert in range(experts)]
    x = CUDA.dispatch(random(7, tokens, k, dtype=dtype), routing)
    results = []
    for ops in (CUDA, REFERENCE):
        weight = ops.stack([ops.pack(matrix) for matrix in matrices], biases)
        results.append(ops.expert_linear(x, routing, weight))
    assert_close(*results, factor=4)


SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SIZES), MixtralConfig(**SIZES, num_local_experts=3)], ids=["llama", "mixtral"]
)
def test_a_decoder_computes_the_same_as_with_the_reference(config: PreTrainedConfig, tmp_path: Path) -> None:
    """All operations together; some layers and tokens have an adapter, and others do not."""
    directory, results = save_checkpoint(config, tmp_path), []
    for ops in (CUDA, REFERENCE):
        decoder = load(directory, ops=ops, quantize="int8")
        driver, adapter = Sequences(decoder), adapter_for(decoder.layouts)
        first = driver.step({"a": [5, 80, 3, 3, 41], "b": [7], "c": [1, 2, 3]}, (Segment(0, 6, adapter),))
        second = driver.step({"b": [9, 60, 2], "a": [17], "c": [4]}, (Segment(0, 4, adapter),))
        results.append(torch.cat([*first.values(), *second.values()]))
    assert_close(*results, factor=500)


def test_own_embeddings_heads_and_norms_of_adapters_are_the_references(tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["Qwen 3, norms of heads"], tmp_path / "base")
    kinds: dict[str, tuple[int, dict[str, object]]] = {
        "norms": (VOCAB, {"modules_to_save": ["norm"]}),
        "tokens": (VOCAB + 3, {"trainable_token_indices": [VOCAB + 1, 3]}),
        "DoRA": (VOCAB, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    }
    adapters = {name: make_adapter(directory, tmp_path / name, *kind) for name, kind in kinds.items()}
    expected, actual = (compute(load(directory, ops=ops), adapters, 16) for ops in (REFERENCE, CUDA))
    for name, logits in expected.items():
        torch.testing.assert_close(actual[name], logits, rtol=1e-3, atol=1e-3)
