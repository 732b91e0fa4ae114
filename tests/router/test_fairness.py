"""Tenants get fair shares of a replica, and a new tenant does not have to wait until a flood is over."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_router.engine import fairness
from loraplex_router.engine.fairness import DECODE, PREFILL
from loraplex_router.engine.scheduler import SHORT
from loraplex_router.vocabulary.sequence import Plan, Sequence
from tests.router.test_scheduler import BLOCK, World, expected

ROWS = 8
LONGEST = 20  # tokens of a prompt


def served(world: World, tenant: str) -> float:
    """The cost of the tokens that were computed for a tenant; recomputed tokens do not count."""
    prompts = outputs = 0
    for sequence in world.sequences:
        if sequence.tenant == tenant:
            prompts += min(sequence.charged, sequence.prompt_length)
            outputs += max(0, sequence.charged - sequence.prompt_length)
    return PREFILL * prompts + DECODE * outputs


def steps_to_first_token(world: World, sequence: Sequence) -> int:
    steps = 0
    while not sequence.output_length:
        assert world.step()
        steps += 1
    return steps


lengths = st.lists(st.tuples(st.integers(1, LONGEST), st.integers(1, 12)), min_size=60, max_size=80)


@settings(deadline=None, max_examples=25)
@given(one=lengths, other=lengths, blocks=st.integers(24, 64))
def test_the_service_of_two_backlogged_tenants_differs_by_at_most_the_papers_constant(one, other, blocks):
    world = World(blocks=blocks, rows=ROWS)
    for tenant, requests in (("one", one), ("other", other)):
        for number, (prompt, answer) in enumerate(requests):  # no two prompts share a block
            world.submit("", [number, tenant == "one", *range(prompt)], answer, tenant=tenant)
    bound = 2 * max(PREFILL * (LONGEST + 2), DECODE * blocks * BLOCK)
    waiting = {"one": True, "other": True}
    while all(waiting.values()):
        assert world.step()
        assert abs(served(world, "one") - served(world, "other")) <= bound
        waiting = {
            tenant: any(s.row is None and not s.finished for s in world.sequences if s.tenant == tenant)
            for tenant in waiting
        }
    world.run()
    assert all(sequence.tokens == expected(sequence) for sequence in world.sequences)


@pytest.mark.parametrize(("flooded", "asked"), [("a", "b"), ("a", "a"), ("", "")])
@pytest.mark.parametrize("prompt", [6, 100])
def test_a_newcomer_waits_for_at_most_one_step_while_another_tenant_floods(
    flooded: str, asked: str, prompt: int
) -> None:
    alone = World(blocks=1000, rows=ROWS)
    undisturbed = steps_to_first_token(alone, alone.submit(asked, [1] * 5, 4, tenant="quiet"))
    world = World(blocks=1000, rows=ROWS)
    for number in range(100):
        world.submit(flooded, [number] * prompt, 50, tenant="loud")
    for turn in range(6):
        for _ in range(12):
            world.step()
        newcomer = world.submit(asked, [1, turn, 1, 1, 1], 4, tenant="quiet")
        assert steps_to_first_token(world, newcomer) <= undisturbed + 1
        while not newcomer.finished:
            world.step()
    world.run(20000)
    assert all(sequence.tokens == expected(sequence) for sequence in world.sequences)


floods = st.lists(st.tuples(st.sampled_from(["", "a", "b"]), st.integers(1, 60), st.integers(1, 30)), min_size=30)
AMPLE = 200  # blocks, in which all rows have room


@settings(deadline=None, max_examples=40)
@given(
    flood=floods,
    adapter=st.sampled_from(["", "a", "b"]),
    prompt=st.integers(1, 16 - ROWS),
    budget=st.integers(16, 64),
    blocks=st.integers(60, 300),
    pauses=st.lists(st.integers(0, 9), min_size=1, max_size=5),
)
def test_whatever_the_flood_the_plan_after_a_newcomers_arrival_has_its_first_token(
    flood, adapter, prompt, budget, blocks, pauses
) -> None:
    """So it waits for the plan in flight and for its own; for one more at most if the flood has just arrived as well,
    or if a block has to be found for it."""
    world = World(blocks=blocks, rows=ROWS, budget=budget)
    world.submit("a", [1], 1)
    world.submit("b", [1], 1)
    world.run()  # the adapters are on the device
    for number, (flooded, length, answer) in enumerate(flood):
        world.submit(flooded, [number] * length, answer, tenant="loud")
    for turn, pause in enumerate(pauses):
        for _ in range(pause):
            world.step()
        begun = any(sequence.row is not None for sequence in world.sequences)
        newcomer = world.submit(adapter, [turn, *range(1, prompt)], 3, tenant="quiet")
        plans = 0
        while not newcomer.in_flight and not newcomer.output_length:
            world.step()
            plans += 1
        assert plans <= (1 if begun and blocks >= AMPLE else 2)
        while not newcomer.finished:
            world.step()
    world.run(20000)
    assert all(sequence.tokens == expected(sequence) for sequence in world.sequences)


def test_the_step_of_a_newcomers_first_token_computes_no_prompts_of_a_flood() -> None:
    world = World(blocks=1000, rows=ROWS, budget=64)
    for number in range(100):
        world.submit("", [number] * 30, 5, tenant="loud")
    met = 0
    for turn in range(12):
        for _ in range(3):
            world.step()
        newcomer = world.submit("", [1, turn] * 10, 4, tenant="quiet")  # too long for a step of its own
        while newcomer.row is None:
            world.step()
        (plan,) = [plan for plan, _ in world.in_flight if newcomer in plan.starts]
        assert all(chunk.length == 1 for chunk in plan.chunks if chunk.sequence is not newcomer)
        met += any(s.row is not None and s.remaining > 1 for s in world.sequences if s.tenant == "loud")
        while not newcomer.finished:
            world.step()
    assert met  # prompts that would have been computed
    world.run(20000)
    assert all(sequence.tokens == expected(sequence) for sequence in world.sequences)


@pytest.mark.parametrize("adapter", ["", "a"])
def test_a_newcomers_short_prompt_is_a_step_of_its_own_and_all_decodes_are_in_the_next_one(adapter: str) -> None:
    world = World(blocks=1000, rows=2 * ROWS, budget=64)
    world.submit("a", [1], 1)
    world.run()
    for number in range(ROWS + 4):
        world.submit("", [number] * 5, 200, tenant="loud")
    for _ in range(6):
        world.step()
    first = world.submit(adapter, [2] * 10, 5, tenant="quiet 2")
    plans = next_plans(world, 1)
    third = world.submit(adapter, [3] * 10, 5, tenant="quiet 3")  # decodes wait for one plan, not for two
    plans += next_plans(world, 2)
    fourth = world.submit(adapter, [4] * 10, 5, tenant="quiet 4")
    plans += next_plans(world, 1)
    newcomers = [{chunk.sequence for chunk in plan.chunks} for plan in plans]
    loud = {sequence for sequence in world.sequences if sequence.tenant == "loud" and sequence.row is not None}
    assert newcomers[0] == {first}
    assert fourth in newcomers[3] and not newcomers[3] & loud
    assert newcomers[1] >= loud | {third}
    assert newcomers[2] >= loud | {first, third}
    world.run(20000)
    assert all(sequence.tokens == expected(sequence) for sequence in world.sequences)


def test_a_newcomers_step_keeps_to_the_budget_although_a_tenant_of_little_weight_dominates() -> None:
    world = World(blocks=1000, rows=40, budget=40)  # which checks the tokens of each plan
    for number in range(4):
        world.submit("", [number] * 5, 200, tenant="loud", weight=0.1)
    for number in range(35):
        world.submit("", [50 + number] * 2, 200, tenant=f"steady {number}")
    for _ in range(12):
        world.step()
    newcomer = world.submit("", [99] * 10, 5, tenant="quiet")
    (plan,) = next_plans(world, 1)
    tenants = {chunk.sequence.tenant for chunk in plan.chunks}
    assert newcomer in plan.starts and "loud" not in tenants and "steady 0" in tenants


def test_a_newcomers_step_contains_decodes_where_nobody_dominates() -> None:
    world = World(blocks=1000, rows=2 * ROWS, budget=64)
    for number in range(12):
        world.submit("", [number] * 5, 200, tenant=f"steady {number % 4}")
    for _ in range(6):
        world.step()
    newcomer = world.submit("", [99] * 10, 5, tenant="quiet")
    (plan,) = next_plans(world, 1)
    assert {chunk.sequence for chunk in plan.chunks} == set(world.sequences)
    assert newcomer in plan.starts


def test_prompts_of_a_flood_take_a_part_of_a_step_while_others_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "LATELY", 20)
    world = World(blocks=1000, rows=ROWS, budget=64)
    for number in range(400):
        world.submit("", [number] * 60, 4, tenant="loud")

    def tokens_of_prompts(plans: int) -> list[int]:
        return [
            sum(chunk.length for chunk in plan.chunks if chunk.start + chunk.length <= chunk.sequence.prompt_length)
            for plan in next_plans(world, plans)
        ]

    assert min(tokens_of_prompts(10)) > 64 - ROWS
    newcomer = world.submit("", [1, 2, 3], 3, tenant="quiet")
    while not newcomer.finished:
        world.step()
    found = tokens_of_prompts(40)
    assert max(found[:15]) == 64 * SHORT
    assert min(found[25:]) > 64 - ROWS
    world.run(20000)


def test_steps_are_full_while_several_tenants_wait() -> None:
    world = World(blocks=1000, rows=ROWS, budget=64)
    for number in range(60):
        world.submit("", [number] * 60, 4, tenant="one")
        world.submit("", [number, 1] * 30, 4, tenant="other", weight=2.0)
    assert min(sum(chunk.length for chunk in plan.chunks) for plan in next_plans(world, 60)) > 64 - ROWS


def next_plans(world: World, count: int) -> list[Plan]:
    """The next ones that are made."""
    found: list[Plan] = []
    while len(found) < count:
        before = world.steps
        assert world.step()
        if world.steps > before:
            found.append(world.last)
    return found


def test_an_adapter_without_running_sequences_gets_a_row_even_if_another_one_of_its_tenant_has_them_all() -> None:
    world = World(blocks=1000, rows=ROWS)
    for number in range(50):
        world.submit("a", [number] * 6, 40)
    for _ in range(12):
        world.step()
    assert steps_to_first_token(world, world.submit("b", [1] * 5, 4)) <= 3


def test_a_newcomer_gets_rows_up_to_its_share() -> None:
    world = World(blocks=1000, rows=ROWS, budget=64)
    for tenant in ("early", "late"):
        for number in range(40):
            world.submit("", [number, tenant == "late", number], 50, tenant=tenant)
        for _ in range(10):
            world.step()
    running = [sequence.tenant for sequence in world.sequences if sequence.row is not None]
    assert sorted(running) == ["early"] * (ROWS // 2) + ["late"] * (ROWS // 2)
    assert world.scheduler.num_yields == ROWS // 2
    world.run(20000)
    assert world.scheduler.num_yields <= len(world.sequences) // 2
    assert world.scheduler.num_preemptions == 0


def test_a_tenant_with_twice_the_weight_gets_twice_the_service() -> None:
    world = World(blocks=1000, rows=ROWS)
    for number in range(100):
        world.submit("", [number] * 6, 20, tenant="light")
        world.submit("", [number, 1] * 3, 20, tenant="heavy", weight=2.0)
    for _ in range(400):
        world.step()
    assert served(world, "heavy") == pytest.approx(2 * served(world, "light"), rel=0.15)


def test_idle_tenants_do_not_accumulate_service() -> None:
    world = World(blocks=1000, rows=ROWS)
    for number in range(60):
        world.submit("", [number] * 6, 20, tenant="steady")
    for _ in range(100):
        world.step()
    before = served(world, "steady")
    for number in range(60):
        world.submit("", [number, 1] * 3, 20, tenant="late")
    for _ in range(60):
        world.step()
    assert served(world, "steady") - before >= 0.7 * served(world, "late")


@pytest.mark.parametrize("adapter", ["", "a", "b"])
@pytest.mark.parametrize("prompt", [6, 100])
def test_background_work_stops_for_a_newcomer_and_continues_after_it(adapter: str, prompt: int) -> None:
    world = World(blocks=200, rows=ROWS, slots=1, budget=64)
    flood = [world.submit("a", [7, number], 30, background=True) for number in range(40)]
    for _ in range(20):
        world.step()
    alone = World(blocks=200, rows=ROWS, slots=1, budget=64)
    steps = steps_to_first_token(alone, alone.submit(adapter, [5] * prompt, 20))
    newcomer = world.submit(adapter, [5] * prompt, 20)
    assert steps_to_first_token(world, newcomer) <= steps + world.depth + 2 * (adapter == "b")
    computed = [sequence.charged for sequence in flood]
    while not newcomer.finished:
        assert world.step()
    assert sum(sequence.charged for sequence in flood) <= sum(computed) + 2 * ROWS
    world.run()
    assert all(sequence.tokens == expected(sequence) for sequence in world.sequences)


def test_background_work_is_shared_among_tenants_and_takes_nothing_from_their_own_shares() -> None:
    world = World(blocks=200, rows=ROWS)
    for tenant in ("one", "other"):
        for number in range(20):
            world.submit("", [number, tenant == "one"], 8, tenant=tenant, background=True)
    for _ in range(30):
        world.step()
    assert abs(served(world, "one") - served(world, "other")) <= 2 * DECODE * ROWS * 8
    first, second = world.submit("", [1], 4, tenant="one"), world.submit("", [2], 4, tenant="new")
    world.step()
    assert first.row is not None and second.row is not None
    world.run()
