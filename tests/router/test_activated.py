"""Activated adapters in the router: where they begin to act, and the warning if they do not."""

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos import shard_pb2 as pb
from loraplex_router.vocabulary.adapter import NEVER, Invocation
from loraplex_router.vocabulary.references import AdapterReference
from loraplex_router.vocabulary.request import Request
from tests.router.test_engine import Setup, setup  # noqa: F401
from tests.router.test_replicas import Cluster

# The tokens' bytes repeat, so the bytes also occur at positions where no token begins.
TOKENS = st.sampled_from([1, 256, 257, 0x01010101, 0x02010101, 0x01010102])


@given(wanted=st.lists(TOKENS, min_size=1, max_size=4), prompt=st.lists(TOKENS, max_size=30), lag=st.integers(0, 1))
def test_an_adapter_acts_from_the_last_occurrence_of_its_invocation(wanted: list[int], prompt: list[int], lag: int):
    places = [at for at in range(len(prompt)) if prompt[at : at + len(wanted)] == wanted]
    assert Invocation(tuple(wanted), lag).find(prompt) == (places[-1] + lag if places else NEVER)


async def test_the_base_computes_a_sequence_up_to_the_invocation_and_the_adapter_the_rest(
    setup: Setup,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    setup.shards.invocation = Invocation((7, 8))
    for prompt, acts_from in {(7, 8, 1, 7, 8, 9): 3, (1, 2, 3): NEVER}.items():
        generation = await setup.service.generate(Request(prompt, adapter=AdapterReference("a"), max_new_tokens=2))
        (delta,) = await generation.collect()
        setup.service.requests.close(generation)
        slot = 0 if acts_from == NEVER else 1
        assert generation.outputs[0].sequence.acts_from == acts_from
        assert [sample.token for sample in delta.samples] == [prompt[-1] + 1 + slot, prompt[-1] + 2 + 2 * slot]
        assert bool(generation.warnings) is (acts_from == NEVER)
        (fields,) = (record.__dict__["fields"] for record in caplog.records if record.message == "request")
        assert fields["warnings"] == (list(generation.warnings) or None)
        caplog.clear()


async def test_a_sequence_that_moves_to_another_replica_is_the_bases_up_to_the_same_position():
    cluster = Cluster()
    cluster.shards.invocation = Invocation((7, 8))
    prompt = (1,) * 37 + (7, 8, 9)
    generation = await cluster.service.generate(Request(prompt, adapter=AdapterReference("a"), max_new_tokens=60))
    while generation.outputs[0].generated < 5:
        await asyncio.sleep(0)
    second = cluster.join("second")
    second.shards.invocation = cluster.shards.invocation
    plans, send = list[tuple[int, int]](), second.shards.send

    async def record(plan: pb.StepRequest) -> None:
        plans.extend(zip(plan.slots, plan.lengths, strict=True))
        await send(plan)

    second.shards.send = record
    cluster.lose(cluster.replica)
    (delta,) = await generation.collect()
    cluster.service.requests.close(generation)
    await cluster.close()
    assert [sample.token for sample in delta.samples] == [9 + 2 * step for step in range(1, 61)]
    slots = [slot for slot, length in plans for _ in range(length)]
    assert slots[:38] == [0] * 37 + [1] and all(slots[37:])
