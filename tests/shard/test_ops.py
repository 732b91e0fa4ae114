"""Each operation's reference compared with a simple formula."""

from types import ModuleType
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GptOssConfig
from transformers.activations import ACT2FN
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.phi3 import modeling_phi3

from loraplex_shard.ops.base import Activation, HeadNorms, Norm
from loraplex_shard.ops.quantized import quantize, rounded_to_int8
from loraplex_shard.ops.reference import ReferenceOperations
from loraplex_shard.shapes.batch import Batch
from loraplex_shard.shapes.cache import LayerCache
from loraplex_shard.shapes.heads import Heads
from tests.shard.operations import BLOCK_SIZE, angles, filled_cache, paged_batch

HEAD_DIM = 8
OPS = ReferenceOperations()


def attention_by_formula(
    query: torch.Tensor, heads: Heads, cache: LayerCache, batch: Batch, sinks: torch.Tensor | None
) -> torch.Tensor:
    """query [tokens, heads, dim]; one token and one head at a time."""
    out = torch.empty(len(query), heads.query, heads.value_dim)
    for chunk, (start, stop) in enumerate(zip(batch.starts, batch.starts[1:], strict=False)):
        for token in range(start, stop):
            position = int(batch.positions[token])
            seen = torch.arange(max(0, position - heads.window + 1) if heads.window else 0, position + 1)
            blocks, offsets = batch.block_tables[chunk, seen // BLOCK_SIZE], seen % BLOCK_SIZE
            for head in range(heads.query):
                kv = head // (heads.query // heads.kv)
                key, value = cache.keys[blocks, kv, :, offsets], cache.values[blocks, kv, offsets]
                scores = key @ query[token, head] * heads.scale
                if heads.soft_cap:
                    scores = heads.soft_cap * torch.tanh(scores / heads.soft_cap)
                weights = scores.exp()
                total = weights.sum() + (0 if sinks is None else sinks[head].exp())
                out[token, head] = weights @ value / total
    return out


chunks = st.lists(st.tuples(st.integers(0, 70), st.one_of(st.just(1), st.integers(1, 12))), min_size=1, max_size=6)


@given(
    chunks=chunks,
    window=st.none() | st.integers(1, 40),
    heads=st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    soft_cap=st.sampled_from([0.0, 2.0]),
    scale=st.sampled_from([0.0, 0.1]),
    value_dim=st.sampled_from([5, HEAD_DIM, 12]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=60)
def test_attention_over_any_mix_of_chunks_equals_the_formula(
    chunks: list[tuple[int, int]],
    window: int | None,
    heads: tuple[int, int],
    soft_cap: float,
    scale: float,
    value_dim: int,
    with_sinks: bool,
    seed: int,
) -> None:
    batch, num_blocks = paged_batch(chunks, seed)
    shape = Heads(*heads, HEAD_DIM, window, soft_cap, scale, value_dim)
    (cache,) = filled_cache(num_blocks, shape, torch.float32, seed).layers
    query, sinks = torch.randn(batch.starts[-1], shape.query, HEAD_DIM), torch.randn(shape.query)
    qkv = torch.cat((query.flatten(1), torch.randn(len(query), shape.width - shape.query * HEAD_DIM)), dim=1)
    actual = OPS.attention(qkv, shape, OPS.prepare(batch), cache, sinks if with_sinks else None)
    expected = attention_by_formula(query, shape, cache, batch, sinks if with_sinks else None)
    torch.testing.assert_close(actual, expected.flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0), (torch.int8, 0.03), (torch.float8_e4m3fn, 0.2)])
def test_keys_and_values_are_only_written_to_their_indices(dtype: torch.dtype, tolerance: float) -> None:
    batch, num_blocks = paged_batch([(4, 1), (18, 2)], seed=0)
    heads = Heads(query=2, kv=1, dim=HEAD_DIM)
    (cache,) = filled_cache(num_blocks, heads, dtype, 0).layers
    before = cache.keys.clone(), cache.values.clone()
    qkv = torch.randn(3, 4 * HEAD_DIM)
    OPS.rotate_and_write(qkv, heads, None, angles(20, HEAD_DIM), OPS.prepare(batch), cache)
    for token, index in enumerate(batch.cache_indices.tolist()):
        block, offset = divmod(index, BLOCK_SIZE)
        key, value = cache.keys[block, 0, :, offset].float(), cache.values[block, 0, offset].float()
        if cache.key_scales is not None and cache.value_scales is not None:
            key, value = key * cache.key_scales[block, 0, offset], value * cache.value_scales[block, 0, offset]
        torch.testing.assert_close(key, qkv[token, 2 * HEAD_DIM : 3 * HEAD_DIM], rtol=0, atol=tolerance)
        torch.testing.assert_close(value, qkv[token, 3 * HEAD_DIM :], rtol=0, atol=tolerance)
        before[0][block, 0, :, offset], before[1][block, 0, offset] = (
            cache.keys[block, 0, :, offset],
            cache.values[block, 0, offset],
        )
    assert cache.keys.equal(before[0]) and cache.values.equal(before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centered", [False, True])
def test_norms_are_computed_in_float32(dtype: torch.dtype, centered: bool) -> None:
    x = (torch.randn(5, 64) * 300).to(dtype)  # its squares overflow float16
    weight, bias = torch.randn(2, 64)
    expected = (F.layer_norm if centered else F.rms_norm)(x.float(), (64,), weight, eps=1e-5)
    for each in (None, bias):
        actual = OPS.norm(x, Norm(weight, each, 1e-5, centered))
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected + (0 if each is None else each), rtol=1e-2, atol=1e-2)


def test_add_norm_also_writes_the_sum() -> None:
    hidden, delta, weight = torch.randn(3, 2, 8)
    total, norm = hidden + 0.5 * delta, Norm(weight[0], None, 1e-6, centered=False)
    assert OPS.add_norm(hidden, delta, 0.5, norm).equal(OPS.norm(total, norm))
    assert hidden.equal(total)


@pytest.mark.parametrize("function", [each for each in get_args(Activation) if each != "clamped_swiglu"])
def test_activations_equal_transformers(function: Activation) -> None:
    x = torch.randn(3, 10) * 3
    theirs = ACT2FN[{"gelu_tanh": "gelu_pytorch_tanh"}.get(function, function)]
    torch.testing.assert_close(OPS.activate(x, function, gated=False), theirs(x))
    torch.testing.assert_close(OPS.activate(x, function, gated=True), theirs(x[:, :5]) * x[:, 5:])


def test_gates_and_ups_of_gpt_oss_are_clamped() -> None:
    experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=1))
    x = torch.randn(20, 10) * 9
    expected = experts._apply_gate(torch.stack((x[:, :5], x[:, 5:]), dim=-1).flatten(1))
    torch.testing.assert_close(OPS.activate(x, "clamped_swiglu", gated=True), expected)


def test_logits_are_scaled_and_capped_and_infinite_ones_are_reported() -> None:
    x = torch.tensor([[1.0, -30.0], [torch.inf, 0.0]])
    logits, finite = OPS.upcast(x, 2.0, soft_cap=10.0)
    torch.testing.assert_close(logits, 10 * torch.tanh(x * 2 / 10))
    assert finite.tolist() == [True, False]


@pytest.mark.parametrize("dim", [HEAD_DIM, HEAD_DIM // 2])
@pytest.mark.parametrize(("modeling", "interleaved"), [(modeling_glm, True), (modeling_phi3, False)])
def test_queries_and_keys_are_normalized_and_rotated_as_in_transformers(
    modeling: ModuleType, interleaved: bool, dim: int
) -> None:
    batch, num_blocks = paged_batch([(7, 5)], seed=0)
    heads = Heads(query=3, kv=1, dim=HEAD_DIM, value_dim=5)
    (cache,) = filled_cache(num_blocks, heads, torch.float32, 0).layers
    qkv, norm = torch.randn(5, heads.width), torch.randn(4, HEAD_DIM)
    normed = torch.nn.functional.rms_norm(qkv[:, : 4 * HEAD_DIM].view(5, 4, -1), (HEAD_DIM,), eps=1e-6) * norm
    query, key = (each.transpose(0, 1)[None] for each in normed.split((3, 1), dim=1))
    angle = torch.arange(12)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    cos, sin = (torch.cat((each, each), dim=-1)[None, 7:12] for each in (angle.cos(), angle.sin()))
    expected = torch.cat(modeling.apply_rotary_pos_emb(query, key, cos, sin), dim=1)[0].transpose(0, 1)
    step, values = OPS.prepare(batch), qkv[:, 4 * HEAD_DIM :].clone()
    OPS.rotate_and_write(qkv, heads, HeadNorms(norm, 1e-6), angles(12, dim, interleaved), step, cache)
    torch.testing.assert_close(qkv[:, : 4 * HEAD_DIM].view(5, 4, -1), expected)
    assert qkv[:, 4 * HEAD_DIM :].equal(values)


def test_queries_and_keys_are_normalized_over_all_heads_of_a_token() -> None:
    batch, num_blocks = paged_batch([(7, 5)], seed=0)
    heads = Heads(query=3, kv=1, dim=HEAD_DIM)
    (cache,) = filled_cache(num_blocks, heads, torch.float32, 0).layers
    qkv, weight = torch.randn(5, heads.width), torch.randn(4, HEAD_DIM)
    query, key, _ = qkv.split((3 * HEAD_DIM, HEAD_DIM, HEAD_DIM), dim=1)
    expected = F.rms_norm(query, (3 * HEAD_DIM,), weight[:3].flatten(), 1e-6), F.rms_norm(key, (HEAD_DIM,), weight[3])
    squares = OPS.head_squares(qkv, heads, 1 / (3 * HEAD_DIM), 1 / HEAD_DIM)
    OPS.rotate_and_write(qkv, heads, HeadNorms(weight, 1e-6, squares), None, OPS.prepare(batch), cache)
    torch.testing.assert_close(qkv[:, : 4 * HEAD_DIM], torch.cat(expected, dim=1))


def test_rotated_keys_are_written_unchanged() -> None:
    batch, num_blocks = paged_batch([(7, 1)], seed=0)
    heads = Heads(query=3, kv=1, dim=HEAD_DIM, value_dim=5)
    (cache,) = filled_cache(num_blocks, heads, torch.float32, 0).layers
    qkv = torch.randn(1, heads.width)
    given = qkv.clone()
    OPS.rotate_and_write(qkv, heads, None, None, OPS.prepare(batch), cache)
    block, offset = divmod(int(batch.cache_indices), BLOCK_SIZE)
    written = torch.cat((cache.keys[block, 0, :, offset], cache.values[block, 0, offset]))
    assert qkv.equal(given) and written.equal(given[0, 3 * HEAD_DIM :])


@given(bits=st.sampled_from([8, 4]), rows=st.integers(1, 5), columns=st.integers(1, 150), offset=st.floats(-3, 3))
@settings(deadline=None)
def test_quantizing_a_matrix_changes_weights_by_at_most_half_a_step(
    bits: int, rows: int, columns: int, offset: float
) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)) + offset
    quantized = quantize(matrix, bits)
    step = quantized.scales.float().amax()
    assert float((quantized.dequantized() - matrix).abs().amax()) <= float(step) * 0.52 + abs(offset) * 2e-3 + 4e-3


def test_a_quantized_layer_rounds_its_input_in_groups() -> None:
    x, matrix = torch.randn(3, 100), quantize(torch.randn(4, 100), 8)
    assert OPS.linear(x, OPS.pack(matrix)).equal(rounded_to_int8(x, 64) @ matrix.dequantized().T)
    assert (rounded_to_int8(x, 64) - x).abs().max() <= x.abs().max() / 127 / 2 * 1.001
