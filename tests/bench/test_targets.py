import asyncio
from pathlib import Path

import pytest

from bench.load import LoadError, Request, Target
from bench.openai_target import CHAT, RESPONSES
from bench.targets import open_target
from loraplex_protos import generation_pb2 as pb
from tests.bench.conftest import StandInOpenAi
from tests.client.scripted import ScriptedServicer


async def arrivals(target: Target, adapter: str | None = None, tokens: int = 5) -> list[int]:
    return [count async for count in target.generate(Request([3, 4, 5], tokens, adapter))]


async def test_grpc_requests_exactly_this_number_of_tokens(address: str, servicer: ScriptedServicer) -> None:
    target = open_target(f"grpc://{address}", None)
    assert sum(await arrivals(target, "sql")) == 5
    assert servicer.requests == [
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[3, 4, 5]),
            adapter=pb.AdapterReference(id="sql"),
            sampling=pb.Sampling(temperature=0),
            stopping=pb.Stopping(max_new_tokens=5, ignore_eos=True),
            n=1,
            detail=pb.Detail(),
        )
    ]
    assert await target.adapters() == ["sql", "org/poet"]
    await target.close()


async def test_openai_also_counts_tokens_without_text(openai: StandInOpenAi) -> None:
    target = open_target(f"openai+http://{openai.address}", None)
    assert await arrivals(target, "sql") == [1, 1, 1, 1, 1]
    assert sum(await arrivals(target)) == 5
    assert [body["model"] for body in openai.bodies] == ["sql", "base"]
    assert openai.bodies[0]["prompt"] == [3, 4, 5]
    assert openai.bodies[0]["ignore_eos"] is True
    assert await target.adapters() == ["sql", "poet"]


async def test_chats_and_responses_are_counted_by_their_own_events() -> None:
    delta, text = {"choices": [{"delta": {"content": "a"}}]}, {"type": "response.output_text.delta", "delta": "a"}
    last = {"type": "response.incomplete", "response": {"usage": {"output_tokens": 3}}}
    for form, events in (
        (CHAT, [delta, delta, {"choices": [], "usage": {"completion_tokens": 3}}]),
        (RESPONSES, [text, text, last]),
    ):
        assert [form.has_text(event) for event in events] == [True, True, False]
        assert [form.total(event) for event in events] == [None, None, 3]
        assert "3 4 5" in str(form.body(Request([3, 4, 5], 3, None)))


async def test_openai_says_what_went_wrong(openai: StandInOpenAi) -> None:
    target = open_target(f"openai+http://{openai.address.removesuffix('/v1')}", None)
    with pytest.raises(LoadError, match="GET /models: 404: no such path"):
        await target.adapters()


async def test_openai_says_that_the_connection_was_closed() -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server:
        with pytest.raises(LoadError, match="without an answer"):
            await open_target(f"openai+http://{host}:{port}/v1", None).adapters()


async def test_peft_runs_requests_of_several_adapters_at_once(checkpoint: Path, adapter_directory: Path) -> None:
    target = open_target(f"peft:{checkpoint}", adapter_directory)
    assert await target.adapters() == ["one", "two"]
    answers = await asyncio.gather(*(arrivals(target, adapter) for adapter in ("one", None, "two", "one")))
    assert answers == [[1] * 5] * 4
    await target.close()


async def test_peft_without_a_directory_has_no_adapters(checkpoint: Path) -> None:
    target = open_target(f"peft:{checkpoint}", None)
    assert await target.adapters() == []
    assert sum(await arrivals(target)) == 5
    with pytest.raises(LoadError, match="--adapter-dir"):
        await arrivals(target, "one")
    await target.close()


def test_another_kind_of_target_is_refused() -> None:
    with pytest.raises(LoadError, match=r"ftp://x: a target is grpc://"):
        open_target("ftp://x", None)
