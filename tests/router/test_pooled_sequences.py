"""Pooled sequences: scheduled in chunks beside others, computed completely, and finished with their last chunk."""

from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_router.vocabulary.sequence import Detail, Plan
from tests.router.test_scheduler import World, expected

POOL = Detail(pool=True)


class PoolingWorld(World):
    """Counts the positions that each pooled sequence has computed since its last start, as a shard accumulates them."""

    def __init__(self, **limits: int) -> None:
        super().__init__(**limits)
        self.summed: dict[int, int] = {}

    def execute(self, plan: Plan) -> list[list[int]]:
        for chunk in plan.chunks:
            if chunk.sequence.detail.pool:
                number = chunk.sequence.number
                self.summed[number] = chunk.length + (self.summed[number] if chunk.start else 0)
                assert not chunk.samples
        return super().execute(plan)

    def apply(self, plan: Plan, results: list[list[int]]) -> None:
        super().apply(plan, results)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.detail.pool and chunk.start + chunk.length == sequence.prompt_length:
                self.scheduler.finish(sequence)


def test_a_pooled_sequence_does_not_read_the_prefix_cache_but_fills_it():
    world = PoolingWorld()
    world.submit("", list(range(17)), 1)
    world.run()
    pooled = world.submit("", list(range(17)), 0, POOL)
    world.run()
    assert pooled.finished and pooled.prefix_hit == 0
    assert world.summed == {pooled.number: 17}
    again = world.submit("", list(range(17)), 1)
    world.run()
    assert again.prefix_hit == 16


@settings(deadline=None, max_examples=100)
@given(
    requests=st.lists(
        st.tuples(
            st.sampled_from(["", "a", "b", "c"]),
            st.lists(st.integers(0, 2), min_size=1, max_size=30),
            st.integers(0, 6),  # output tokens; 0: pooled
            st.integers(0, 4),  # turns between the last arrival and this one
        ),
        max_size=16,
    ),
    blocks=st.integers(11, 30),
    depth=st.integers(1, 2),
)
def test_all_sequences_end_and_every_pooled_position_counts_once(requests, blocks, depth):
    world = PoolingWorld(blocks=blocks, depth=depth)
    for adapter, prompt, tokens, pause in requests:
        for _ in range(pause):
            world.step()
        world.submit(adapter, prompt, tokens, POOL if not tokens else None)
    world.run()
    for sequence in world.sequences:
        assert sequence.finished
        if sequence.detail.pool:
            assert world.summed[sequence.number] == sequence.prompt_length
        else:
            assert sequence.tokens == expected(sequence)
    assert world.blocks.used == 0 and world.scheduler.num_running == 0 and world.scheduler.num_waiting == 0
