"""A request that names several adapters: one generation for each, prepared together, counted as one request."""

from hashlib import sha256

import pytest

from loraplex_protos.errors import (
    AdapterInvalidError,
    AdapterNotFoundError,
    ForbiddenError,
    InvalidRequestError,
    OverloadedError,
    RateLimitedError,
)
from loraplex_router.access.keys import TenantSettings
from loraplex_router.api.readers import read_each
from loraplex_router.engine.generation import Generation
from loraplex_router.vocabulary.references import AdapterReference
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sequence import Detail, FinishReason
from tests.router.test_engine import Setup, setup  # noqa: F401

A, B, C = (AdapterReference(name) for name in "abc")


def asking(*adapters: AdapterReference | None, **options: object) -> Request:
    return Request(**{"prompt": (1,), "adapters": adapters, "max_new_tokens": 3, **options})


async def answers(setup: Setup, request: Request, key: str | None = None) -> dict[int, list[int]]:  # noqa: F811
    generations = await setup.service.generate_each(request, key)
    found: dict[int, list[int]] = {}
    async for index, delta in read_each(generations, Generation.deltas):
        found.setdefault(index, []).extend(sample.token for sample in delta.samples)
    for generation in generations:
        setup.service.requests.close(generation)
    return found


async def test_each_adapter_answers_n_times_in_the_order_of_the_request(setup: Setup):  # noqa: F811
    found = await answers(setup, asking(B, None, A, n=2))
    slots = {name: setup.pool.get(f"digest of {name}").slot for name in "ab"}
    steps = [slots["b"] + 1, slots["b"] + 1, 1, 1, slots["a"] + 1, slots["a"] + 1]
    assert found == {index: [1 + step, 1 + 2 * step, 1 + 3 * step] for index, step in enumerate(steps)}
    assert setup.service.requests.idle


async def test_more_adapters_than_slots_take_turns(setup: Setup):  # noqa: F811
    assert len(await answers(setup, asking(A, B, C, None))) == 4


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (asking(A, adapter=B), "adapters: cannot be combined with another adapter"),
        (asking(*[A] * 17), "adapters: at most 16, and 64 answers"),
        (asking(A, B, n=33), "adapters: at most 16, and 64 answers"),
        (asking(A, AdapterReference("../x")), r"adapters\[1\]\.id: .* is not a valid adapter name"),
        (asking(A, AdapterReference("x", "moon")), r"adapters\[1\]\.source"),
        (asking(A, B, detail=Detail(prompt_logprobs=True)), r"detail\.prompt_logprobs: cannot be combined"),
    ],
)
async def test_requests_that_several_adapters_cannot_answer_are_refused(setup: Setup, request_: Request, message: str):  # noqa: F811
    with pytest.raises(InvalidRequestError, match=message):
        await setup.service.generate_each(request_)
    assert setup.shards.log == []


async def test_an_adapter_that_cannot_be_served_is_named_before_any_answers(setup: Setup):  # noqa: F811
    with pytest.raises(AdapterNotFoundError, match="absent"):
        await setup.service.generate_each(asking(A, AdapterReference("absent"), None))

    async def broken(reference: AdapterReference) -> None:
        raise AdapterInvalidError("adapter_model.safetensors is cut short")

    setup.shards.stage = broken
    with pytest.raises(AdapterInvalidError, match=r"adapter 'c': adapter_model\.safetensors is cut short"):
        await setup.service.generate_each(asking(A, None, C))
    assert not any(entry.startswith("plan") for entry in setup.shards.log)
    assert setup.service.requests.idle and not any(adapter.leases or adapter.requests for adapter in setup.pool)


async def test_several_adapters_are_one_request_of_a_key_and_each_must_be_allowed():
    settings = TenantSettings(
        keys=[sha256(b"k").hexdigest()], adapters=["a", "b"], max_requests=1, tokens_per_minute=100
    )
    setup = Setup(tenants={"t": settings})  # noqa: F811
    with pytest.raises(ForbiddenError, match="'c'"):
        await setup.service.generate_each(asking(A, C), "k")
    first = await setup.service.generate_each(asking(A, B, None), "k")
    with pytest.raises(RateLimitedError, match="1 requests at once"):
        await setup.service.generate_each(asking(A), "k")
    for generation in first:
        setup.service.requests.close(generation)
    for _ in range(2):  # what never ran costs nothing
        for generation in await setup.service.generate_each(asking(A, B, prompt=(1,) * 60), "k"):
            setup.service.requests.close(generation)
    for generation in await setup.service.generate_each(asking(A, B, prompt=(1,) * 60), "k"):
        generation.started = generation.queued
        setup.service.requests.close(generation)
    with pytest.raises(RateLimitedError, match="100 tokens a minute"):
        await setup.service.generate_each(asking(A), "k")


async def test_the_queue_counts_all_answers():
    setup = Setup(max_queue=5)  # noqa: F811
    with pytest.raises(InvalidRequestError, match="adapters: asks for 6 answers in all, but at most 5 fit"):
        await setup.service.generate_each(asking(A, B, n=3))
    assert len(await setup.service.generate_each(asking(A, B, n=2))) == 2
    with pytest.raises(OverloadedError):
        await setup.service.generate_each(asking(A, B))


async def test_several_adapters_run_on_one_replica_and_are_cancelled_together():
    setup = Setup()  # noqa: F811
    second = setup.add_replica("1")
    await second.adapters.resolve(B)
    generations = await setup.service.generate_each(asking(A, B, None, request_id="all"))
    (holder,) = [replica for replica in setup.replicas if replica.scheduler.num_waiting]
    assert holder.scheduler.num_waiting == 3
    with pytest.raises(InvalidRequestError, match="already running"):
        await setup.service.generate_each(asking(A, request_id="all"))
    setup.service.requests.close(generations.pop())
    setup.service.cancel_request("all")
    assert [o.finish_reason for g in generations for o in g.outputs] == [FinishReason.CANCELLED] * 2
    for generation in generations:
        setup.service.requests.close(generation)
    assert setup.service.requests.idle
