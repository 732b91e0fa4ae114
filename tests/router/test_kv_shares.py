"""A tenant with a share of the KV cache leaves the rest to others, and uses it while nobody else wants it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_router.vocabulary.sequence import Sequence
from tests.router.test_scheduler import BLOCK, World, expected

SHARE = 0.25


def held(world: World, tenant: str) -> int:
    """The blocks that a tenant's running sequences hold, each counted once."""
    return len({block for s in world.sequences if s.tenant == tenant for block in s.blocks})


def running(world: World, tenant: str) -> list[Sequence]:
    return [s for s in world.sequences if s.tenant == tenant and s.row is not None]


def flood(world: World, tenant: str, count: int, share: float, answer: int = 20) -> None:
    for number in range(count):
        world.submit("", [number, share < 1] * 4, answer, tenant=tenant, kv_share=share)


def test_a_tenant_uses_what_nobody_else_wants_and_gives_it_up_at_once() -> None:
    world = World(blocks=40, rows=20, budget=64)
    flood(world, "small", 12, SHARE, answer=80)
    for _ in range(12):
        world.step()
    assert held(world, "small") > 30
    flood(world, "other", 12, 1.0, answer=80)
    for _ in range(12):
        world.step()
    assert held(world, "small") <= SHARE * 40 + len(running(world, "small"))
    assert held(world, "other") > 25
    world.run(20000)
    assert all(sequence.tokens == expected(sequence) for sequence in world.sequences)


def test_what_exceeds_a_share_is_preempted_first_although_it_is_older() -> None:
    world = World(blocks=20, rows=8, budget=64)
    small = [world.submit("", [number] * 8, 40, tenant="small", kv_share=SHARE) for number in range(2)]
    other = [world.submit("", [number, 9] * 4, 40, tenant="other") for number in range(2)]
    while not world.scheduler.num_preemptions:
        world.step()
    assert [s.row is None for s in small + other] == [False, True, False, False]
    world.run()


def test_what_exceeds_a_share_yields_to_others_even_if_they_have_more_sequences() -> None:
    world = World(blocks=20, rows=8, budget=64)
    for number in range(3):
        world.submit("", [number, 9], 60, tenant="other")
    for number in range(2):
        world.submit("", [number] * 20, 8, tenant="small", kv_share=SHARE)
    world.step()
    assert held(world, "small") == 10
    newcomer = world.submit("", [7] * 36, 9, tenant="other")
    world.step()
    world.step()
    assert newcomer.row is not None and len(running(world, "small")) == 1
    world.run()


def test_nobody_yields_to_what_would_exceed_a_share() -> None:
    world = World(blocks=20, rows=8, budget=64)
    for number in range(4):
        world.submit("", [number, 9] * 6, 12, tenant="other")
    world.submit("", [1] * 12, 12, tenant="small", kv_share=SHARE)
    world.step()
    for _ in range(3):
        world.submit("", [2] * 12, 12, tenant="small", kv_share=SHARE)
        world.step()
    assert world.scheduler.num_yields == 0 and len(running(world, "other")) == 4
    world.run()


def test_a_sequence_longer_than_the_share_runs_and_is_not_starved() -> None:
    world = World(blocks=40, rows=8, budget=64)
    flood(world, "other", 40, 1.0)
    long = world.submit("", [1] * 60, 4, tenant="small", kv_share=SHARE)
    for _ in range(100):
        world.step()
    assert long.finished
    world.run(20000)


def test_a_prefix_that_a_tenants_sequences_share_counts_once() -> None:
    world = World(blocks=40, rows=8, budget=64)
    flood(world, "other", 4, 1.0, answer=60)
    prompt = [3] * (7 * BLOCK)
    for number in range(3):
        world.submit("", [*prompt, number], 8, tenant="small", kv_share=SHARE)
        world.step()
    assert len(running(world, "small")) == 3 and held(world, "small") == 10
    world.run(20000)


arrivals = st.lists(
    st.tuples(
        st.sampled_from(["small", "small", "other", "third"]),
        st.lists(st.integers(0, 2), min_size=1, max_size=30),
        st.integers(1, 16),
        st.integers(0, 3),  # turns until the next one
        st.booleans(),  # whether it is a background one
    ),
    min_size=10,
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(arrivals=arrivals, blocks=st.integers(16, 40), share=st.sampled_from([0.1, 0.3, 0.6]))
def test_nothing_beyond_a_share_starts_while_others_wait_and_everything_ends(arrivals, blocks, share):
    world = World(blocks=blocks, rows=6)

    def step() -> bool:
        world.scheduler._turns.begin_anew()
        before, ran, head = held(world, "small"), running(world, "small"), world.scheduler._turns.next()
        attempts = head.attempts if head else 0
        going = world.step()
        started = any(s not in ran for s in running(world, "small"))
        passed_over = head is not None and head.tenant != "small" and not head.background and head.attempts == attempts
        if started and passed_over and len(running(world, "small")) > 1:
            assert held(world, "small") <= max(before, share * blocks)
        return going

    for tenant, prompt, answer, pause, background in arrivals:
        own = share if tenant == "small" else 1.0
        world.submit("", prompt, answer, tenant=tenant, kv_share=own, background=background)
        for _ in range(pause):
            step()
    for _ in range(5000):
        if not step():
            break
    assert all(s.finished and s.tokens == expected(s) for s in world.sequences)
    assert world.blocks.used == 0 and not world.scheduler._places._shares
