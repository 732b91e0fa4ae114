import asyncio
import inspect
from contextlib import aclosing

import pytest

from loraplex import (
    AdapterTier,
    AsyncClient,
    Client,
    DeadlineError,
    FinishReason,
    GenerationError,
    InvalidRequestError,
    LoraplexError,
    UnavailableError,
)
from loraplex_protos import generation_pb2 as pb
from tests.client.scripted import ENDLESS, ScriptedServicer


def methods(client: type) -> dict[str, list[inspect.Parameter]]:
    return {
        name: list(inspect.signature(method).parameters.values())
        for name, method in inspect.getmembers(client, inspect.isfunction)
        if not name.startswith("_")
    }


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    assert methods(AsyncClient) == methods(Client)


async def test_the_ordinary_client_also_works_where_an_event_loop_runs(client: Client) -> None:
    assert client.generate("Count").text == "".join(piece.text for piece in client.stream("Count"))


async def left(servicer: ScriptedServicer) -> bool:
    return await asyncio.to_thread(servicer.left.wait, 10)


async def test_generate_gives_the_answer(async_client: AsyncClient) -> None:
    generation = await async_client.generate("Count", n=2, seed=7, adapter="sql")
    assert generation.text == " one two three"
    assert [sequence.seed for sequence in generation.sequences] == [7, 8]
    assert generation.adapter_digest == "d1" * 32


async def test_stream_gives_the_same_text_piece_by_piece(async_client: AsyncClient) -> None:
    pieces = [piece async for piece in async_client.stream("Count")]
    assert [piece.text for piece in pieces] == [" one", " two", " three", ""]
    assert pieces[-1].finish_reason is FinishReason.LENGTH


async def test_many_streams_run_at_once(async_client: AsyncClient) -> None:
    async def ask() -> str:
        return "".join([piece.text async for piece in async_client.stream("Count", max_new_tokens=20)])

    answers = await asyncio.gather(*(ask() for _ in range(16)))
    assert set(answers) == {(" one two three" * 7)[: len(answers[0])]}


async def test_leaving_the_loop_cancels_the_request(async_client: AsyncClient, servicer: ScriptedServicer) -> None:
    async for piece in async_client.stream(ENDLESS):
        assert piece.text == " 0"
        break
    assert await left(servicer)


async def test_closing_the_stream_cancels_the_request(async_client: AsyncClient, servicer: ScriptedServicer) -> None:
    async with aclosing(async_client.stream(ENDLESS)) as stream:
        await anext(stream)
        assert not servicer.left.is_set()
    assert await left(servicer)


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_cancelling_the_task_cancels_the_request(
    method: str, async_client: AsyncClient, servicer: ScriptedServicer
) -> None:
    async def ask() -> None:
        if method == "generate":
            await async_client.generate(ENDLESS)
        else:
            async for _ in async_client.stream(ENDLESS):
                pass

    task = asyncio.create_task(ask())
    while not servicer.requests:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await left(servicer)


async def test_the_timeout_is_a_deadline(async_client: AsyncClient) -> None:
    with pytest.raises(DeadlineError):
        await async_client.generate(ENDLESS, timeout=0.1)


async def test_the_timeout_is_a_deadline_for_a_stream(async_client: AsyncClient) -> None:
    with pytest.raises(DeadlineError):
        async for _ in async_client.stream(ENDLESS, timeout=0.1):
            pass


async def test_a_bad_value_is_refused_before_a_stream_begins(async_client: AsyncClient) -> None:
    with pytest.raises(InvalidRequestError, match="top_k"):
        async_client.stream("Count", top_k=-1)


async def test_the_servers_error_is_raised(async_client: AsyncClient, servicer: ScriptedServicer) -> None:
    servicer.failures = [LoraplexError("a bug")]
    with pytest.raises(LoraplexError, match="a bug"):
        await async_client.generate("Hi")
    servicer.failure_after_first_piece = GenerationError("not finite")
    stream = async_client.stream("Count")
    assert (await anext(stream)).text == " one"
    with pytest.raises(GenerationError, match="not finite"):
        await anext(stream)


async def test_a_missing_server_is_an_unavailable_error() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError, match=r"no server answers at 127\.0\.0\.1:1$"):
            await client.info()


async def test_the_other_calls_return_the_same_as_the_clients(
    async_client: AsyncClient, client: Client, servicer: ScriptedServicer
) -> None:
    assert await async_client.tokenize("hi") == client.tokenize("hi")
    assert await async_client.adapters() == client.adapters()
    assert await async_client.info() == client.info()
    assert (await async_client.load_adapter("sql", revision="main")).tier is AdapterTier.HOST
    servicer.requests.clear()
    await async_client.unload_adapter("sql", source="local")
    assert (await async_client.pin_adapter("sql")).pinned
    assert not (await async_client.unpin_adapter("sql")).pinned
    await async_client.cancel("r-9")
    assert servicer.requests == [
        pb.UnloadAdapterRequest(adapter=pb.AdapterReference(id="sql", source="local")),
        pb.PinAdapterRequest(adapter=pb.AdapterReference(id="sql")),
        pb.UnpinAdapterRequest(adapter=pb.AdapterReference(id="sql")),
        pb.CancelGenerationRequest(request_id="r-9"),
    ]
