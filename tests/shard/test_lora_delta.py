"""The LoRA delta of a mixed batch equals the dense formula, row by row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_shard.lora.weights.arena import in_one_piece
from loraplex_shard.ops.reference import ReferenceOperations
from loraplex_shard.shapes.adapter import AdapterWeights, Expansion, LayerWeights
from loraplex_shard.shapes.batch import Segment
from loraplex_shard.shapes.layout import LinearLayout

IN_FEATURES, PARTS = 7, (5, 3, 4)

OPS = ReferenceOperations()
FUSED = LinearLayout("fused", 0, (), IN_FEATURES, slice(0, IN_FEATURES))
ANOTHER = LinearLayout("another", 1, (), IN_FEATURES, slice(0, IN_FEATURES))

LoraRanks = tuple[int | None, ...]  # lora_rank of each part; None: not adapted


def adapter_of(lora_ranks: LoraRanks, generator: torch.Generator) -> AdapterWeights:
    shrinks, expansions = [torch.empty(0, IN_FEATURES)], []
    start = rank_start = 0
    for out_features, lora_rank in zip(PARTS, lora_ranks, strict=True):
        if lora_rank is not None:
            shrinks.append(torch.randn(lora_rank, IN_FEATURES, generator=generator))
            weight = torch.randn(lora_rank, out_features, generator=generator)
            expansions.append(Expansion(rank_start, rank_start + lora_rank, start, start + out_features, weight))
            rank_start += lora_rank
        start += out_features
    layers = {"fused": LayerWeights(0, torch.cat(shrinks), tuple(expansions))} if expansions else {}
    return in_one_piece(layers, 2)


def dense_delta(adapter: AdapterWeights) -> torch.Tensor:
    delta = torch.zeros(sum(PARTS), IN_FEATURES)
    if layer := adapter.layers.get("fused"):
        for e in layer.expansions:
            delta[e.start : e.stop] = e.weight.T @ layer.shrink[e.rank_start : e.rank_stop]
    return delta


@settings(deadline=None)
@given(
    adapters=st.lists(st.tuples(*[st.none() | st.integers(1, 9)] * len(PARTS)), min_size=1, max_size=4),
    runs=st.lists(st.tuples(st.integers(1, 6), st.none() | st.integers(0, 3)), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_each_run_of_tokens_gets_its_adapters_delta_and_base_rows_get_none(
    adapters: list[LoraRanks], runs: list[tuple[int, int | None]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [adapter_of(lora_ranks, generator) for lora_ranks in adapters]
    tokens = sum(length for length, _ in runs)
    x = torch.randn(tokens, IN_FEATURES, generator=generator)
    base = torch.randn(tokens, sum(PARTS), generator=generator)
    expected, segments, start = base.clone(), [], 0
    for length, choice in runs:
        if choice is not None:
            adapter = weights[choice % len(weights)]
            segments.append(Segment(start, start + length, adapter))
            expected[start : start + length] += x[start : start + length] @ dense_delta(adapter).T
        start += length

    out = base.clone()
    OPS.add_lora_delta(out, x, tuple(segments), FUSED)

    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    untouched = torch.ones(tokens, dtype=torch.bool)
    for segment in segments:
        untouched[segment.start : segment.stop] = False
    assert out[untouched].equal(base[untouched])


def test_other_layers_are_unchanged() -> None:
    adapter = adapter_of((4, None, 4), torch.Generator().manual_seed(0))
    out = torch.ones(3, sum(PARTS))
    OPS.add_lora_delta(out, torch.ones(3, IN_FEATURES), (Segment(0, 3, adapter),), ANOTHER)
    assert out.equal(torch.ones(3, sum(PARTS)))


def test_a_copy_of_an_adapters_memory_is_the_same_adapter() -> None:
    adapter = adapter_of((4, None, 2), torch.Generator().manual_seed(0))
    moved = adapter.at(adapter.memory.clone())
    adapter.memory.zero_()
    assert moved.memory.any() and not torch.equal(moved.table, adapter.table)
    for name, layer in moved.layers.items():
        assert [t.shape for t in layer.tensors] == [t.shape for t in adapter.layers[name].tensors]
        assert all(tensor.any() for tensor in layer.tensors)
        begin, end = moved.memory.data_ptr(), moved.memory.data_ptr() + moved.memory.nbytes
        assert all(begin <= tensor.data_ptr() < end for tensor in layer.tensors)
