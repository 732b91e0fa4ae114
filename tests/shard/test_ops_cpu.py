"""The CPU kernels compute the same as the reference, for all shapes, dtypes and instruction sets."""

from dataclasses import replace
from math import inf, nan
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_shard.kernels.library import INSTRUCTION_SETS, Kernels, build, instruction_sets
from loraplex_shard.lora.weights.deltas import Delta, partition_adapter
from loraplex_shard.ops.base import Activation, HeadNorms, Norm
from loraplex_shard.ops.cpu.operations import CpuOperations
from loraplex_shard.ops.quantized import quantize
from loraplex_shard.ops.reference import ReferenceOperations
from loraplex_shard.shapes.batch import Segment
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import LinearLayout, LinearPart
from tests.shard.operations import (
    angles,
    assert_close,
    cached,
    cpu_operations,
    filled_cache,
    kernels_directory,
    paged_batch,
    random,
)

pytestmark = pytest.mark.slow

REFERENCE = ReferenceOperations()
DTYPES = torch.float32, torch.bfloat16
dtypes = st.sampled_from(DTYPES)
cache_dtypes = st.sampled_from([*DTYPES, torch.int8])
many = settings(deadline=None, max_examples=40)


@pytest.fixture(params=INSTRUCTION_SETS, scope="module")
def cpu(request: pytest.FixtureRequest) -> CpuOperations:
    if request.param not in instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    return cpu_operations(request.param)


@many
@given(
    tokens=st.integers(1, 40) | st.just(150),
    features=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    dtype=dtypes,
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_linear_layer_of_any_shape(
    cpu: CpuOperations, tokens: int, features: tuple[int, int], dtype: torch.dtype, bias: bool, seed: int
) -> None:
    x, matrix = random(seed, tokens, features[0], dtype=dtype), random(seed + 1, *features[::-1], dtype=dtype)
    b = random(seed + 2, features[1], dtype=dtype) if bias else None
    expected = REFERENCE.linear(x.float(), REFERENCE.pack(matrix.float()), None if b is None else b.float())
    assert_close(cpu.linear(x, cpu.pack(matrix), b), expected.to(dtype))
    around = torch.zeros(tokens + 2, features[1], dtype=dtype)
    cpu.put_linear(around[1:-1], x, cpu.pack(matrix), b)
    assert around[1:-1].equal(cpu.linear(x, cpu.pack(matrix), b)) and not around[[0, -1]].any()


@many
@given(
    tokens=st.integers(1, 20) | st.just(150),
    features=st.tuples(st.integers(1, 200), st.integers(1, 70)),
    bits=st.sampled_from([8, 4]),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_a_quantized_linear_layer_of_any_shape(
    cpu: CpuOperations, tokens: int, features: tuple[int, int], bits: int, dtype: torch.dtype, seed: int
) -> None:
    x = random(seed, tokens, features[0], dtype=dtype)
    matrix = quantize(random(seed + 1, *features[::-1]), bits)
    b = random(seed + 2, features[1], dtype=dtype)
    actual, expected = cpu.linear(x, cpu.pack(matrix), b), REFERENCE.linear(x, REFERENCE.pack(matrix), b)
    assert_close(actual, expected)


@many
@given(rows=st.integers(1, 50), columns=st.integers(1, 70), form=st.sampled_from([8, 4, *DTYPES]), dtype=dtypes)
def test_an_embedding_returns_rows_of_the_matrix(
    cpu: CpuOperations, rows: int, columns: int, form: int | torch.dtype, dtype: torch.dtype
) -> None:
    matrix = random(0, rows, columns)
    weight = quantize(matrix, form) if isinstance(form, int) else matrix.to(dtype)
    batch, _ = paged_batch([(0, 2 * rows)], seed=0)
    batch.token_ids.copy_(torch.arange(rows).flip(0).repeat(2))
    for scale in (1.0, 5.0):
        actual = cpu.embedding(cpu.prepare(batch), cpu.pack(weight), dtype, scale)
        assert_close(actual, REFERENCE.embedding(REFERENCE.prepare(batch), REFERENCE.pack(weight), dtype, scale))


def test_a_part_of_a_weight_is_the_same_rows_of_the_layer(cpu: CpuOperations) -> None:
    x, matrix = random(0, 3, 40), random(1, 50, 40)
    for weight in (matrix, quantize(matrix, 8), quantize(matrix, 4)):
        packed = cpu.pack(weight)
        whole = cpu.linear(x, packed)
        for rows in (slice(0, 16), slice(16, 48), slice(32, 50)):
            assert cpu.linear(x, packed.part(rows)).equal(whole[:, rows])


@many
@given(
    rows=st.integers(1, 9),
    n=st.integers(1, 100),
    dtype=dtypes,
    centered=st.booleans(),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_norms(
    cpu: CpuOperations,
    rows: int,
    n: int,
    dtype: torch.dtype,
    centered: bool,
    bias: bool,
    scale: float,
    seed: int,
) -> None:
    x, delta = (random(seed + i, rows, n, dtype=dtype) * 3 for i in range(2))
    norm = Norm(random(2, n), random(3, n) if bias else None, 1e-2, centered)
    assert_close(cpu.norm(x, norm), REFERENCE.norm(x, norm))
    hidden, sums, expected = x.clone(), x.clone(), x.clone()
    assert_close(cpu.add_norm(hidden, delta, scale, norm), REFERENCE.add_norm(expected, delta, scale, norm))
    cpu.add_(sums, delta, scale)
    assert_close(hidden, expected)
    assert sums.equal(hidden)


@many
@given(
    rows=st.integers(1, 9),
    n=st.integers(1, 100),
    function=st.sampled_from(get_args(Activation)),
    gated=st.booleans(),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_activations(
    cpu: CpuOperations, rows: int, n: int, function: Activation, gated: bool, dtype: torch.dtype, seed: int
) -> None:
    x = torch.cat((random(seed, rows, n, dtype=dtype) * 10, random(seed + 1, rows, n, dtype=dtype)), dim=1)
    assert_close(cpu.activate(x, function, gated), REFERENCE.activate(x, function, gated))


@many
@given(heads=st.builds(Heads, st.integers(1, 9), st.integers(1, 9), st.integers(1, 40)), dtype=dtypes)
def test_squares_of_heads(cpu: CpuOperations, heads: Heads, dtype: torch.dtype) -> None:
    qkv = random(0, 3, heads.width, dtype=dtype)
    actual, expected = (ops.head_squares(qkv, heads, 0.5, 0.1) for ops in (cpu, REFERENCE))
    torch.testing.assert_close(actual, expected)


@many
@given(
    rows=st.integers(1, 4),
    n=st.integers(1, 70) | st.integers(8000, 20_000),
    dtype=dtypes,
    broken=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 20_000), st.sampled_from([inf, -inf, nan])),
)
def test_upcasting_and_finding_finite_rows(
    cpu: CpuOperations, rows: int, n: int, dtype: torch.dtype, broken: tuple[int, int, float] | None
) -> None:
    x = random(0, rows, n, dtype=dtype)
    if broken:
        x[broken[0] % rows, broken[1] % n] = broken[2]
    capped, expected_capped = (ops.upcast(x, 3.0, soft_cap=2.0)[0] for ops in (cpu, REFERENCE))
    if not broken:
        assert_close(capped, expected_capped)
    (wide, finite), (expected, expected_finite) = cpu.upcast(x), REFERENCE.upcast(x)
    assert wide.dtype == torch.float32
    assert wide.nan_to_num(5).equal(expected.nan_to_num(5))
    assert finite.equal(expected_finite)
    for width in (n - 1, n + 1, n + 40):
        wider, finite = cpu.upcast(x, width=width)
        assert wider.nan_to_num(5).equal(REFERENCE.upcast(x, width=width)[0].nan_to_num(5))
        assert finite.equal(expected_finite)


def test_large_negative_gates_close_and_large_positive_ones_open(cpu: CpuOperations) -> None:
    gates = torch.tensor([[-1e4, 1e4, 2.0, 3.0]])
    for function in get_args(Activation):
        expected = [0.0, {"relu2": 3e8, "clamped_swiglu": 7.0 * 4}.get(function, 3e4)]
        assert cpu.activate(gates, function, gated=True).allclose(torch.tensor([expected]))


chunks = st.lists(st.tuples(st.integers(0, 90), st.just(1) | st.integers(1, 40)), min_size=1, max_size=6)
heads = st.builds(
    Heads,
    query=st.sampled_from([4, 8]),
    kv=st.sampled_from([1, 2, 4]),
    dim=st.sampled_from([8, 20, 64]),
    window=st.none() | st.integers(1, 60),
    soft_cap=st.sampled_from([0.0, 5.0]),
    scale=st.sampled_from([0.0, 0.2]),
    value_dim=st.sampled_from([0, 0, 7, 32, 96]),
)


@many
@given(chunks=chunks, heads=heads, cache_dtype=cache_dtypes, sinks=st.booleans(), seed=st.integers(0, 99))
def test_attention_over_any_mix_of_chunks(
    cpu: CpuOperations, chunks: list[tuple[int, int]], heads: Heads, cache_dtype: torch.dtype, sinks: bool, seed: int
) -> None:
    dtype = torch.float32 if cache_dtype == torch.int8 else cache_dtype
    batch, num_blocks = paged_batch(chunks, seed)
    (layer,) = filled_cache(num_blocks, heads, cache_dtype, seed).layers
    qkv = random(seed, batch.starts[-1], heads.width, dtype=dtype)
    scores = random(seed + 1, heads.query) * 3 if sinks else None
    actual = cpu.attention(qkv, heads, cpu.prepare(batch), layer, scores)
    assert_close(actual, REFERENCE.attention(qkv, heads, REFERENCE.prepare(batch), layer, scores), factor=2)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.int8], ids=["float32", "bfloat16", "int8"])
def test_attention_of_long_decodes_beside_a_long_chunk(
    cpu: CpuOperations, dim: int, group: int, cache_dtype: torch.dtype
) -> None:
    heads = Heads(query=2 * group, kv=2, dim=dim, value_dim=64 if group == 3 else dim)
    dtype = torch.bfloat16 if cache_dtype == torch.int8 else cache_dtype
    batch, num_blocks = paged_batch([(2600, 1), (100, 512), (1023, 1), (1024, 1), (0, 1)], seed=0)
    (layer,) = filled_cache(num_blocks, heads, cache_dtype, 0).layers
    qkv = random(0, batch.starts[-1], heads.width, dtype=dtype)
    sinks = random(1, heads.query) if group == 8 else None
    actual = cpu.attention(qkv, heads, cpu.prepare(batch), layer, sinks)
    assert_close(actual, REFERENCE.attention(qkv, heads, REFERENCE.prepare(batch), layer, sinks), factor=2)


def test_memory_after_a_sequences_last_position_is_never_used(cpu: CpuOperations) -> None:
    heads = Heads(query=2, kv=1, dim=16)
    batch, num_blocks = paged_batch([(5, 1), (16, 3)], seed=0)
    (layer,) = filled_cache(num_blocks, heads, torch.float32, 0).layers
    qkv = random(0, 4, 64)
    expected = cpu.attention(qkv, heads, cpu.prepare(batch), layer)
    for row, context in enumerate(batch.context_lengths):
        last = batch.block_tables[row, (context - 1) // 16]
        layer.keys[last, :, :, (context - 1) % 16 + 1 :] = torch.nan
        layer.values[last, :, (context - 1) % 16 + 1 :] = torch.nan
    assert cpu.attention(qkv, heads, cpu.prepare(batch), layer).equal(expected)


def test_a_sequences_attention_does_not_depend_on_its_neighbours(cpu: CpuOperations) -> None:
    heads = Heads(query=6, kv=2, dim=64)
    together, num_blocks = paged_batch([(1500, 1), (30, 9), (40, 1)], seed=0)
    (layer,) = filled_cache(num_blocks, heads, torch.float32, 0).layers
    qkv = random(0, 11, 640)
    out = cpu.attention(qkv, heads, cpu.prepare(together), layer)
    alone, _ = paged_batch([(1500, 1), (30, 9), (40, 1)][:1], seed=0)
    alone.block_tables.copy_(together.block_tables[:1])
    assert cpu.attention(qkv[:1].clone(), heads, cpu.prepare(alone), layer).equal(out[:1])


@many
@given(
    chunks=chunks,
    heads=heads,
    norm=st.booleans(),
    rotary_dim=st.sampled_from([None, 0, 4]),
    interleaved=st.booleans(),
    form=cache_dtypes,
    seed=st.integers(0, 99),
)
def test_rotation_and_writing_to_the_cache(
    cpu: CpuOperations,
    chunks: list[tuple[int, int]],
    heads: Heads,
    norm: bool,
    rotary_dim: int | None,
    interleaved: bool,
    form: torch.dtype,
    seed: int,
) -> None:
    dtype = torch.float32 if form == torch.int8 else form
    batch, num_blocks = paged_batch(chunks, seed)
    qkv = random(seed, batch.starts[-1], heads.width, dtype=dtype)
    norms = HeadNorms(random(1, heads.query + heads.kv, heads.dim), 1e-6) if norm else None
    if norms and seed % 2:
        norms = replace(norms, squares=random(2, len(qkv), 2).square())
    rotary = None if rotary_dim == 0 else angles(150, rotary_dim or heads.dim, interleaved)
    if rotary and seed % 3 == 0:
        rotary = replace(rotary, query_scale=random(4, 150))
    results = []
    for ops in (cpu, REFERENCE):
        mine = qkv.clone()
        (layer,) = filled_cache(num_blocks, heads, form, seed).layers
        ops.rotate_and_write(mine, heads, norms, rotary, ops.prepare(batch), layer)
        results.append((mine, *cached(layer)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, factor=2000 if form == torch.int8 else 2)


def touches(lora_ranks: tuple[int | None, ...]) -> bool:
    return any(lora_rank is not None for lora_rank in lora_ranks)


@many
@given(
    lora_ranks=st.lists(st.tuples(*[st.none() | st.integers(0, 20)] * 3).filter(touches), min_size=1, max_size=4),
    runs=st.lists(st.tuples(st.integers(1, 7) | st.just(70), st.none() | st.integers(0, 3)), min_size=1, max_size=6),
    dtype=dtypes,
    int8=st.booleans(),
    in_features=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_lora_deltas_of_mixed_ranks(
    cpu: CpuOperations,
    lora_ranks: list[tuple[int | None, ...]],
    runs: list[tuple[int, int | None]],
    dtype: torch.dtype,
    int8: bool,
    in_features: int,
    seed: int,
) -> None:
    sizes = (200, 30, 17)

    def affine(lora_rank: int, part: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        own = random(seed + lora_rank, 2, sizes[part])
        return None if lora_rank % 3 == 2 else own[0], None if lora_rank % 2 else own[1]

    parts = tuple(LinearPart(f"p{i}", size, (slice(0, size),)) for i, size in enumerate(sizes))
    layouts = [
        LinearLayout("other", 0, parts[:1], in_features, slice(0, in_features)),
        LinearLayout("fused", 1, parts, in_features, slice(0, in_features)),
    ]
    adapters = [
        partition_adapter(
            {
                f"p{i}": Delta(random(seed + i, r, in_features), random(seed + i, sizes[i], r), 0.5, *affine(r, i))
                for i, r in enumerate(ranks)
                if r is not None
            },
            layouts,
            torch.int8 if int8 else dtype,
        )
        for ranks in lora_ranks
    ]
    for adapter in adapters:
        assert adapter.weights.layers["fused"].index == 1
    segments, start = [], 0
    for length, choice in runs:
        if choice is not None:
            segments.append(Segment(start, start + length, adapters[choice % len(adapters)].weights))
        start += length
    x, base = random(seed, start, in_features, dtype=dtype), random(seed + 5, start, sum(sizes), dtype=dtype)
    actual, expected = base.clone(), base.float()
    cpu.add_lora_delta(actual, x, tuple(segments), layouts[1])
    REFERENCE.add_lora_delta(expected, x.float(), tuple(segments), layouts[1])
    assert_close(actual, expected.to(dtype), factor=2)


@pytest.mark.parametrize("int8", [False, True])
def test_a_row_that_is_not_finite_does_not_change_the_others_of_its_run(cpu: CpuOperations, int8: bool) -> None:
    layout = LinearLayout("one", 0, (LinearPart("p", 40, (slice(0, 40),)),), 70, slice(0, 70))
    deltas = {"p": Delta(random(1, 5, 70), random(2, 40, 5), 0.5)}
    adapter = partition_adapter(deltas, [layout], torch.int8 if int8 else torch.bfloat16).weights
    x, expected = random(3, 37, 70, dtype=torch.bfloat16), random(4, 37, 40, dtype=torch.bfloat16)
    actual, broken, segments = expected.clone(), x.clone(), (Segment(0, 37, adapter),)
    broken[20] = torch.nan
    cpu.add_lora_delta(expected, x, segments, layout)
    cpu.add_lora_delta(actual, broken, segments, layout)
    assert actual[20].isnan().all()
    others = torch.arange(37) != 20
    assert torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 4, 1), (7, 5, 3), (70, 130, 8)])
def test_a_mixture_of_experts(cpu: CpuOperations, tokens: int, experts: int, chosen: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.stack([torch.randperm(experts) / 16 for _ in range(tokens)]).to(dtype)  # all are different
    x = random(1, tokens, 33, dtype=dtype)
    shared, gate = random(2, tokens, 20, dtype=dtype), random(3, tokens, 1, dtype=dtype)
    matrices = [random(expert, 20, 33, dtype=dtype) for expert in range(experts)]
    biases = [random(expert, 20, dtype=dtype) for expert in range(experts)]
    for normalized in (False, True):
        results = []
        for ops in (cpu, REFERENCE):
            routing = ops.route(logits, chosen, normalized)
            weight = ops.stack([ops.pack(matrix) for matrix in matrices], biases)
            outputs = ops.expert_linear(ops.dispatch(x, routing), routing, weight)
            results.append((ops.combine(outputs, routing), ops.combine(outputs, routing, shared, gate)))
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected, factor=4)


def test_a_token_whose_logits_are_not_finite_does_not_change_the_others(cpu: CpuOperations) -> None:
    logits, x = random(0, 3, 4), random(1, 3, 16)
    whole = cpu.combine(cpu.dispatch(x, routing := cpu.route(logits, 2, True)), routing)
    logits[1] = torch.nan
    broken = cpu.combine(cpu.dispatch(x, routing := cpu.route(logits, 2, True)), routing)
    assert broken[1].isnan().all()
    assert broken[[0, 2]].equal(whole[[0, 2]])


def test_a_kernel_takes_only_its_own_parameters_by_name() -> None:
    kernels = Kernels(build(kernels_directory(), "portable"))
    shape = {"n": 32, "k": 64, "bits": 4, "group": 32}
    reordered = dict(reversed(shape.items()))
    assert kernels.call("quantized_bytes", **shape) == kernels.call("quantized_bytes", **reordered) > 0
    for wrong in (shape | {"rows": 1}, {"n": 32, "k": 64}, {"n": 32, "k": 64, "bits": 4, "groups": 32}):
        with pytest.raises(TypeError, match="quantized_bytes takes"):
            kernels.call("quantized_bytes", **wrong)
