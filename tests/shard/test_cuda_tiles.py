"""The tiles of a batch's attention: each token attends to each of its positions once."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_shard.ops.cuda.tiles import SHORT, SPLIT, make_tiles
from loraplex_shard.shapes.heads import Heads
from tests.shard.operations import paged_batch

CPU = torch.device("cpu")
chunks = st.lists(
    st.tuples(st.integers(0, 40) | st.integers(500, 1600), st.just(1) | st.integers(1, 90)), min_size=1, max_size=4
)


@settings(deadline=None, max_examples=50)
@given(
    chunks=chunks,
    window=st.none() | st.integers(1, 700),
    group=st.integers(1, 8) | st.just(71),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_each_token_sees_each_position_once(
    chunks: list[tuple[int, int]], window: int | None, group: int, dtype: torch.dtype
) -> None:
    batch, _ = paged_batch(chunks, seed=0)
    tiles = make_tiles(batch, Heads(query=2 * group, kv=2, dim=8, window=window), dtype, CPU)
    seen: Counter[tuple[int, int]] = Counter()
    results: dict[int, int] = {}
    for rows, part in (SHORT, tiles.short), (tiles.rows, tiles.long):
        for chunk, start, count, position, first, stop, place in part.entries.tolist():
            assert 0 < count * group <= rows and batch.starts[chunk] <= start
            for token in range(count):
                own = position + token
                assert own == batch.positions[start + token]
                lowest = first if window is None else max(first, own - window + 1)
                seen.update((start + token, each) for each in range(lowest, min(stop, own + 1)))
                if place >= 0:
                    assert stop - first <= SPLIT
                    assert results.setdefault(place + token, start + token) == start + token
    for token, own in enumerate(batch.positions.tolist()):
        lowest = 0 if window is None else max(0, own - window + 1)
        assert all(seen.pop((token, each)) == 1 for each in range(lowest, own + 1))
    assert not seen
    combined = {
        place + number * step: token
        for token, place, step, count in tiles.split.entries.tolist()
        for number in range(count)
    }
    assert combined == results and sorted(results) == list(range(tiles.partials))
