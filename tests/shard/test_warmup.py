"""The plans of the warm-up fit what a rank can do, and have something of each kind among them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos.shard_pb2 import StepRequest
from loraplex_shard.sampling.stages import NEUTRAL, STAGES
from loraplex_shard.shapes.cache import KVCache, StateForm
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.stepping.warmup import Limits, each_stage, plans, recorded

CPU = torch.device("cpu")


def cache(states: bool = False) -> KVCache:
    forms = [StateForm((2,), torch.float32)] if states else []
    return KVCache([Heads(1, 1, 4)], 3, 16, torch.float32, CPU, forms, sequences=2)


def steps(limits: Limits, states: bool = False) -> list[StepRequest]:
    return list(plans(limits, cache(states), samples=True, flat=True))


@given(
    limits=st.builds(Limits, tokens=st.integers(1, 300), sequences=st.integers(1, 40), context=st.integers(1, 2000)),
    states=st.booleans(),
)
def test_no_plan_exceeds_the_limits(limits: Limits, states: bool) -> None:
    found = steps(limits, states)
    assert len(found) >= 3
    for plan in found:
        assert 0 < len(plan.rows) <= limits.sequences and sum(plan.lengths) <= limits.tokens
        assert list(plan.slots) == sorted(plan.slots) and set(plan.blocks) <= set(range(3))
        assert sum(plan.block_counts) == len(plan.blocks)
        for start, length, count in zip(plan.starts, plan.lengths, plan.block_counts, strict=True):
            assert start.computed + length == len(start.tokens) <= min(limits.context, 16 * count)
            assert not (states and start.computed)


def test_the_largest_steps_and_one_of_each_kind_are_among_them() -> None:
    found = steps(Limits(tokens=256, sequences=64, context=10_000))
    assert max(sum(plan.lengths) for plan in found) == 256
    assert {1, 16, 64} <= {len(plan.rows) for plan in found}
    decodes = next(plan for plan in found if len(plan.rows) == 64)
    assert all(start.sampling.temperature > 1000 and start.sampling.top_p < 1 for start in decodes.starts)
    contexts = {start.computed for plan in found for start in plan.starts}
    assert max(contexts) > 8192 and any(512 < context < 1024 for context in contexts)
    with_adapter = [length for plan in found for length, slot in zip(plan.lengths, plan.slots, strict=True) if slot]
    assert sorted(with_adapter) == [1, 17]


def test_every_size_is_recorded_without_an_adapter_and_with_one_as_far_as_the_limits_allow() -> None:
    found = list(recorded((1, 2, 8, 16, 64), Limits(tokens=32, sequences=8, context=100), cache(), samples=True))
    assert [(len(plan.rows), sum(plan.lengths), max(plan.slots)) for plan in found] == [
        *((1, 16, slot) for slot in (0, 2)),
        *((rows, size, slot) for size in (8, 2) for slot in (0, 2) for rows in (1, size)),
        *((1, 1, slot) for slot in (0, 2)),
    ]


def test_each_stage_of_sampling_is_asked_for_once() -> None:
    asked = [{field.name: value for field, value in sampling.ListFields()} for sampling in each_stage()]
    for stage, given_values in zip(STAGES, asked, strict=True):
        changed = {name for name, value in given_values.items() if value != NEUTRAL[name]}
        assert changed - {"temperature", "seed"} == set(stage.neutral)
