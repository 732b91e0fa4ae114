"""A call is admitted to the queue as a whole, before anything of it is started."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from loraplex_protos.errors import InvalidRequestError, OverloadedError, UnavailableError
from loraplex_router.access.tenant import Allowance, Tenant
from loraplex_router.engine.generation import Generation
from loraplex_router.service.admission import Admission
from loraplex_router.vocabulary.request import EmbedRequest, Request
from tests.router.test_engine import Setup
from tests.router.test_http_streams import Client


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    made = Setup(max_queue=4)
    task = asyncio.create_task(made.engine.run())
    yield made
    task.cancel()
    with suppress(asyncio.CancelledError, UnavailableError):
        await task


def prompts(count: int, **options: object) -> list[Request]:
    return [Request(**{"prompt": (number + 1,), "max_new_tokens": 3, **options}) for number in range(count)]


def inputs(count: int, background: bool = False) -> EmbedRequest:
    return EmbedRequest(tuple((number,) for number in range(count)), background=background)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (prompts(5), "prompt: asks for 5 answers in all, but at most 4 fit into the queue"),
        (prompts(2, n=3), "prompt: asks for 6 answers in all, but at most 4 fit"),
        (prompts(1, n=5), "n: asks for 5 answers in all, but at most 4 fit"),
        (prompts(3, background=True), "at most 2 of background requests fit into the queue: .* larger --max-queue"),
    ],
)
async def test_what_can_never_wait_is_refused_for_good_and_costs_nothing(
    setup: Setup, requests: list[Request], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await setup.service.generate_all(requests)
    assert setup.service.requests.idle and "plan 0" not in setup.shards.log
    assert (await setup.service.usage())[1] == []


async def test_a_client_is_told_the_field_and_the_fix(setup: Setup) -> None:
    client = Client(setup, "/v1/completions", {"model": "base", "prompt": ["A"] * 3, "n": 2})
    await client.run()
    assert (
        client.status == 400 and "`prompt` asks for 6 answers" in client.bodies[0] and "--max-queue" in client.bodies[0]
    )


def watch_started(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> list[Generation]:
    """A list of all that are started from now on."""
    started, queued = list[Generation](), setup.telemetry.queued
    monkeypatch.setattr(setup.telemetry, "queued", lambda generation: started.append(generation) or queued(generation))
    return started


@pytest.mark.parametrize("background", [False, True])
async def test_a_call_that_does_not_fit_now_is_refused_before_any_of_it_is_started(
    background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(max_queue=4)  # its engine does not run
    started = watch_started(setup, monkeypatch)
    running = await setup.service.generate_all(prompts(1))
    size = 2 if background else 4
    with pytest.raises(OverloadedError, match="try again later"):
        await setup.service.generate_all(prompts(size, background=background))
    running += await setup.service.generate_all(prompts(size - 1, background=background))
    with pytest.raises(OverloadedError, match="try again later"):
        await setup.service.pooling.embed(inputs(2, background))
    assert started == running
    for generation in running:
        setup.service.requests.close(generation)
    assert setup.service.requests.idle


async def test_each_of_several_calls_at_once_is_started_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(max_queue=4)  # its engine does not run
    started = watch_started(setup, monkeypatch)
    calls = [setup.service.generate_all(prompts(3, prompt="A text.")) for _ in range(3)]
    first, *others = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(first, list) and len(first) == 3 and started == first
    assert [type(other) for other in others] == [OverloadedError] * 2
    for generation in first:
        setup.service.requests.close(generation)
    assert setup.service.requests.idle


@pytest.mark.parametrize("background", [False, True])
async def test_any_number_of_inputs_is_embedded_while_others_may_wait(setup: Setup, background: bool) -> None:
    embedding = asyncio.create_task(setup.service.pooling.embed(inputs(50, background)))
    most = 0
    while not embedding.done():
        most = max(most, setup.replicas.num_waiting)
        await asyncio.sleep(0)
    assert [each.values.tolist() for each in await embedding] == [[number] for number in range(50)]
    assert 0 < most <= (1 if background else 2)
    assert setup.service.requests.idle


async def test_a_call_that_has_begun_waits_for_room_that_others_have_taken(setup: Setup) -> None:
    admission, tenant = Admission(setup.replicas, max_queue=4), Tenant("", Allowance())
    with admission.room(1, tenant, background=False) as room:
        admission.queued(room, 1)
        with admission.room(4, tenant, background=False):
            extending = asyncio.create_task(admission.extend(room))
            await asyncio.sleep(0.05)
            assert not extending.done() and room.sequences == 0
        await extending
        assert room.sequences == 1
    assert admission.idle


async def test_inputs_that_have_begun_are_all_embedded_though_the_server_shuts_down(setup: Setup) -> None:
    embedding = asyncio.create_task(setup.service.pooling.embed(inputs(30, background=True)))
    await asyncio.sleep(0)
    requests = setup.service.requests
    requests.draining = True
    await setup.replicas.changes.until(lambda: requests.idle)
    assert requests.num_running == 30  # all have been started
    assert len(await embedding) == 30
    with pytest.raises(UnavailableError, match="shutting down"):
        await setup.service.pooling.embed(inputs(1))
