"""The HTTP faces over an engine without a model: clients that leave or are slow, and errors before and after the
first byte."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from loraplex_router.api.http import sse
from tests.router.test_engine import Setup

STREAMS = {
    "/generate_stream": {"inputs": "A", "parameters": {"max_new_tokens": 40, "details": True}},
    "/v1/completions": {"model": "base", "prompt": "A", "max_tokens": 40, "temperature": 0, "stream": True},
}
WHOLE = {
    "/generate": {"inputs": "A", "parameters": {"max_new_tokens": 40}},
    "/v1/completions": {"model": "base", "prompt": ["A", "B"], "max_tokens": 40, "temperature": 0},
}
MANY = 150  # tokens: more than are generated before the server notices that a client has left


class Client:
    """Sends one request to the application, as uvicorn would."""

    def __init__(self, setup: Setup, path: str, body: object = None, **headers: str) -> None:
        """Without a body, it is a GET."""
        path, _, query = path.partition("?")
        self._app = setup.app
        self._scope = {
            "type": "http",
            "method": "GET" if body is None else "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [
                (b"content-type", b"application/json"),
                *((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()),
            ],
        }
        self._body = json.dumps(body).encode()
        self._gone = asyncio.Event()
        self._read = False
        self.reads = asyncio.Event()  # cleared while the client is slow
        self.reads.set()
        self.messages: list[dict[str, Any]] = []

    async def run(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    def leave(self) -> None:
        self._gone.set()

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def bodies(self) -> list[str]:
        return [message["body"].decode() for message in self.messages[1:] if message.get("body")]

    @property
    def events(self) -> list[Any]:
        lines = "".join(self.bodies).split("\n\n")
        return [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]

    async def _receive(self) -> dict[str, Any]:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        await asyncio.sleep(0)
        await self.reads.wait()


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    made = Setup(max_queue=4)
    task = asyncio.create_task(made.engine.run())
    yield made
    assert made.service.requests.idle
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert made.blocks.used == 0


async def until(reached: Any) -> None:
    async with asyncio.timeout(60):
        while not reached():
            await asyncio.sleep(0)


@pytest.mark.parametrize("path", STREAMS)
async def test_closing_a_stream_ends_its_sequence(setup: Setup, path: str):
    body = {**STREAMS[path], "max_tokens": MANY, "parameters": {"max_new_tokens": MANY}}
    client = Client(setup, path, body)
    running = asyncio.create_task(client.run())
    await until(lambda: len(client.messages) > 3)
    client.leave()
    await running
    assert setup.service.requests.idle and "".join(client.bodies).count("data: ") < 40


@pytest.mark.parametrize("path", WHOLE)
async def test_leaving_before_a_whole_answer_ends_its_sequences(setup: Setup, path: str):
    setup.shards.loads_held.clear()
    body = {**WHOLE[path], "model": "a"} if path.startswith("/v1") else {**WHOLE[path]}
    if not path.startswith("/v1"):
        body["parameters"] = {"adapter_id": "a"}
    client = Client(setup, path, body)
    running = asyncio.create_task(client.run())
    await until(lambda: not setup.engine.idle)
    client.leave()
    await running  # although the adapter is never loaded
    setup.shards.loads_held.set()
    assert client.status == 499


async def test_a_slow_reader_gets_what_it_missed_in_one_event_and_delays_nobody(setup: Setup):
    client = Client(setup, "/v1/completions", STREAMS["/v1/completions"])
    running = asyncio.create_task(client.run())
    await until(lambda: len(client.messages) > 2)
    client.reads.clear()
    assert await setup.answer(10, tokens=30) == list(range(11, 41))
    await until(lambda: setup.engine.idle)
    client.reads.set()
    await running
    assert len(client.events) < 20
    assert client.events[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_slow_lorax_stream_still_has_one_event_per_token(setup: Setup):
    client = Client(setup, "/generate_stream", STREAMS["/generate_stream"])
    running = asyncio.create_task(client.run())
    await until(lambda: client.messages)
    client.reads.clear()
    await until(lambda: setup.engine.idle)
    client.reads.set()
    await running
    assert len(client.events) == 40 and len(client.bodies) < 10
    assert "".join(event["token"]["text"] for event in client.events) == client.events[-1]["generated_text"]
    assert client.events[-1]["details"]["generated_tokens"] == 40


@pytest.mark.parametrize("path", STREAMS)
async def test_a_full_queue_is_a_429_with_retry_after_before_the_stream_begins(setup: Setup, path: str):
    setup.shards.loads_held.clear()
    held = [asyncio.create_task(setup.answer(1, adapter="a")) for _ in range(4)]
    await until(lambda: sum(adapter.waiting for adapter in setup.pool) == 4)
    client = Client(setup, path, STREAMS[path])
    await client.run()
    assert client.status == 429 and int(client.headers["retry-after"]) >= 1
    setup.shards.loads_held.set()
    await asyncio.gather(*held)


async def test_the_service_tier_flex_is_background_work(setup: Setup):
    setup.shards.loads_held.clear()
    body = {**WHOLE["/v1/completions"], "model": "a", "prompt": "A"}
    clients = [Client(setup, "/v1/completions", {**body, "service_tier": tier}) for tier in ("flex", "auto")]
    running = [asyncio.create_task(client.run()) for client in clients]
    await until(lambda: sum(adapter.waiting for adapter in setup.pool) == 2)
    generations = list(setup.service.requests._running)
    queued = {output.sequence.background for generation in generations for output in generation.outputs}
    assert queued == {True, False}
    setup.shards.loads_held.set()
    await asyncio.gather(*running)
    assert [client.status for client in clients] == [200, 200]


@pytest.mark.parametrize("path", STREAMS)
async def test_a_failure_after_the_first_token_is_the_last_event(setup: Setup, path: str):
    setup.shards.failing_token = 45
    client = Client(setup, path, STREAMS[path])
    await client.run()
    assert client.status == 200 and len(client.events) > 3
    error = client.events[-1]["error"]
    assert "NaN" in (error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize("path", WHOLE)
async def test_a_failure_of_a_whole_answer_is_a_500(setup: Setup, path: str):
    setup.shards.failing_token = 45
    client = Client(setup, path, WHOLE[path])
    await client.run()
    assert client.status == 500


@pytest.mark.parametrize("write", [sse.event, sse.named_event])
def test_an_event_is_one_line_to_clients_that_divide_it_at_unicodes_line_ends_too(write: Any):
    data = {"type": "delta", "text": "a\u2028b\u2029c\x85d\ve\x1cf é 漢 😀"}
    line, end = write(data).decode().splitlines()[-2:]  # as httpx's iter_lines does
    assert json.loads(line.removeprefix("data: ")) == data and end == ""
    assert "é 漢 😀" in line


@pytest.mark.parametrize("path", STREAMS)
async def test_a_draining_server_answers_503(setup: Setup, path: str):
    setup.service.requests.draining = True
    client = Client(setup, path, STREAMS[path])
    await client.run()
    assert client.status == 503
    assert client.headers["connection"] == "close"  # the client's next connection may lead to another router


async def test_more_prompts_than_may_ever_wait_are_refused_for_good(setup: Setup):
    body = {**WHOLE["/v1/completions"], "prompt": ["A"] * 5}
    client = Client(setup, "/v1/completions", body)
    await client.run()
    assert client.status == 400 and "at most 4 fit into the queue" in client.bodies[0]
    assert setup.service.requests.idle


@pytest.mark.parametrize("ends", ["cancelled by name", "the server stops"])
async def test_a_request_that_is_ended_by_others_gets_an_error_that_says_whether_to_try_again(setup: Setup, ends: str):
    setup.shards.loads_held.clear()
    client = Client(setup, "/generate", {"inputs": "A", "parameters": {"adapter_id": "a"}}, x_request_id="mine")
    running = asyncio.create_task(client.run())
    await until(lambda: not setup.engine.idle)
    if ends == "the server stops":
        await setup.service.requests.hand_over()
    else:
        setup.service.cancel_request("mine")
    await running
    setup.shards.loads_held.set()
    error = json.loads(client.bodies[0])
    if ends == "the server stops":
        assert client.status == 503 and "shutting down: send the request again" in error["error"]
    else:
        assert client.status == 499 and error["error_type"] == "cancelled"


@pytest.mark.parametrize("path", STREAMS)
async def test_a_stream_with_nothing_to_send_sends_comments(setup: Setup, path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.01)
    setup.shards.loads_held.clear()
    body = {**STREAMS[path], "model": "a", "parameters": {"adapter_id": "a", "max_new_tokens": 40}}
    client = Client(setup, path, body)
    running = asyncio.create_task(client.run())
    await until(lambda: len(client.bodies) > 2)
    assert set(client.bodies) == {":\n\n"}
    setup.shards.loads_held.set()
    await running
    assert "".join(client.bodies).count("data: ") > 1


@pytest.mark.parametrize("path", ["/openapi.json", "/api-doc/openapi.json"])
async def test_streams_go_on_while_the_document_of_the_api_is_made(setup: Setup, path: str):
    client, turns = Client(setup, path), 0
    running = asyncio.create_task(client.run())
    while not running.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 50  # of the event loop, which also runs the streams
    assert "/generate" in json.loads("".join(client.bodies))["paths"]
