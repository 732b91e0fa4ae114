"""Each operation's reference against a plain formula."""

from math import sqrt
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from loraplex_shard.batch import Batch
from loraplex_shard.ops.paged_attention import paged_attention, prepare_reads
from loraplex_shard.ops.rms_norm import rms_norm
from loraplex_shard.ops.rotary import rotate_
from loraplex_shard.ops.silu_mul import silu_mul
from loraplex_shard.ops.write_kv import write_kv

HEAD_DIM = 8


def paged_batch(chunks: list[tuple[int, int]], block_size: int, seed: int) -> tuple[Batch, int]:
    """A batch of chunks, each (positions computed before, tokens), over shuffled blocks, and how many blocks."""
    needed = [-(-(before + tokens) // block_size) for before, tokens in chunks]
    num_blocks = sum(needed) + 2
    blocks = Random(seed).sample(range(num_blocks), num_blocks)
    tables = torch.zeros(len(chunks), max(needed), dtype=torch.long)
    starts, positions, indices = [0], [], []
    for row, ((before, tokens), count) in enumerate(zip(chunks, needed, strict=True)):
        own, blocks = blocks[:count], blocks[count:]
        tables[row, :count] = torch.tensor(own)
        starts.append(starts[-1] + tokens)
        positions += range(before, before + tokens)
        indices += [own[p // block_size] * block_size + p % block_size for p in range(before, before + tokens)]
    batch = Batch(
        token_ids=torch.zeros(starts[-1], dtype=torch.long),
        positions=torch.tensor(positions),
        cache_indices=torch.tensor(indices),
        starts=tuple(starts),
        context_lengths=tuple(before + tokens for before, tokens in chunks),
        block_tables=tables,
        segments=(),
    )
    return batch, num_blocks


def attention_by_formula(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, window: int | None
) -> torch.Tensor:
    """One token and one head at a time."""
    block_size, group = keys.shape[1], query.shape[1] // keys.shape[2]
    out = torch.empty_like(query)
    for chunk, (start, stop) in enumerate(zip(batch.starts, batch.starts[1:], strict=False)):
        for token in range(start, stop):
            position = int(batch.positions[token])
            seen = torch.arange(max(0, position - window + 1) if window else 0, position + 1)
            blocks, offsets = batch.block_tables[chunk, seen // block_size], seen % block_size
            for head in range(query.shape[1]):
                key, value = keys[blocks, offsets, head // group], values[blocks, offsets, head // group]
                out[token, head] = (key @ query[token, head] / sqrt(HEAD_DIM)).softmax(0) @ value
    return out


chunks = st.lists(st.tuples(st.integers(0, 70), st.one_of(st.just(1), st.integers(1, 12))), min_size=1, max_size=6)


@given(
    chunks=chunks,
    block_size=st.sampled_from([1, 3, 8]),
    window=st.one_of(st.none(), st.integers(1, 40)),
    heads=st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=60)
def test_attention_over_any_mix_of_chunks_is_that_of_the_formula(
    chunks: list[tuple[int, int]], block_size: int, window: int | None, heads: tuple[int, int], seed: int
) -> None:
    batch, num_blocks = paged_batch(chunks, block_size, seed)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch.starts[-1], heads[0], HEAD_DIM, generator=generator)
    keys, values = torch.randn(2, num_blocks, block_size, heads[1], HEAD_DIM, generator=generator)
    actual = paged_attention(query, keys, values, prepare_reads(batch, block_size, window, torch.float32))
    torch.testing.assert_close(actual, attention_by_formula(query, keys, values, batch, window), rtol=1e-4, atol=1e-5)


def test_decodes_of_very_different_lengths_are_not_all_padded_to_the_longest() -> None:
    batch, _ = paged_batch([(3, 1), (1000, 1), (60, 1)], block_size=4, seed=0)
    decodes = prepare_reads(batch, 4, None, torch.float32).decodes
    assert sorted((len(reads.tokens), reads.blocks.shape[1]) for reads in decodes) == [(1, 1), (1, 16), (1, 251)]


def test_keys_and_values_land_where_the_indices_say_and_nowhere_else() -> None:
    keys, values = torch.zeros(2, 3, 4, 1, 2)
    key, value = torch.randn(2, 2, 1, 2)
    write_kv(key, value, keys, values, torch.tensor([9, 2]))
    for cache, new in ((keys, key), (values, value)):
        assert torch.equal(cache[2, 1], new[0])
        assert torch.equal(cache[0, 2], new[1])
        assert cache.count_nonzero() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 64) * 300).to(dtype)  # its squares overflow float16
    weight = torch.randn(64).to(dtype)
    exact = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()
    actual = rms_norm(x, weight, 1e-5)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_rms_norm_takes_a_weight_per_row() -> None:
    x, weight = torch.randn(4, 3, 16), torch.randn(3, 16)
    expected = torch.stack([rms_norm(x[:, row], weight[row], 1e-6) for row in range(3)], dim=1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)


def test_rotation_is_that_of_transformers() -> None:
    query, key = torch.randn(7, 4, HEAD_DIM), torch.randn(7, 2, HEAD_DIM)
    angles = torch.randn(7, HEAD_DIM // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=1)
    sign = torch.tensor([-1.0] * (HEAD_DIM // 2) + [1.0] * (HEAD_DIM // 2))
    heads = torch.cat((query, key), dim=1)
    rotate_(heads, cos[:, None], (sin * sign)[:, None])
    torch.testing.assert_close(heads, torch.cat(expected, dim=1))


def test_silu_mul_gates_the_second_half_by_the_first() -> None:
    gate, up = torch.randn(2, 3, 10)
    before = torch.cat((gate, up), dim=1)
    gate_up = before.clone()
    torch.testing.assert_close(silu_mul(gate_up), gate * torch.sigmoid(gate) * up)
    assert torch.equal(gate_up, before)
