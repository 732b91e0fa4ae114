"""Two routers that share a Redis server: one is killed, then the other one is stopped, and no stream notices."""

import asyncio
import json
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import AsyncClient, Regex, StreamPiece
from tests.e2e.processes import Router, Shard, free_port
from tests.redis_server import redis_server
from tests.tools import needs_redis

pytestmark = needs_redis

TOKENS = 300
LONG = {"max_new_tokens": TOKENS, "ignore_eos": True}
STREAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "adapter": {"adapter": "r8"},
    "seeded": {"temperature": 1.0, "seed": 7},
    "penalized": {"temperature": 0.8, "seed": 8, "frequency_penalty": 0.5, "top_p": 0.9},
    "n": {"temperature": 1.0, "seed": 9, "n": 3},
    "logprobs": {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": True},
    "adapters": {"adapters": ["r4", "dora", None]},
    "grammar": {"grammar": Regex("(<name>[a-z]{5}</name>, ){40}")},
    "scored grammar": {"grammar": Regex("(<name>[a-z]{5}</name>, ){40}"), "logprobs": True},
    "stop": {"stop": ["\U0001f600never"]},
}
CHAT = {
    "model": "r4",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    with redis_server(tmp_path) as (url, _):
        yield url


def told(pieces: list[StreamPiece]) -> dict[int, tuple[Any, ...]]:
    """What the pieces say, by sequence."""
    found = {}
    for index in {piece.index for piece in pieces}:
        own = [piece for piece in pieces if piece.index == index]
        tokens = [token for piece in own for token in piece.tokens]
        assert all(piece.finish_reason is None for piece in own[:-1])
        found[index] = (
            "".join(piece.text for piece in own),
            [token.id for token in tokens],
            [pytest.approx(token.logprob, abs=1e-4) for token in tokens if token.logprob is not None],
            [[each.id for each in token.alternatives] for token in tokens],
            [token.id for piece in own for token in piece.prompt],
            own[-1].finish_reason,
            own[-1].usage and own[-1].usage.generated_tokens,
            own[-1].seed,
        )
    return found


class EventSource:
    """Reads a stream of server-sent events, and comes back with the last event's id, to one router after the other."""

    def __init__(self, urls: list[str], body: dict[str, Any]) -> None:
        self._urls, self._body = urls, body
        self.events: list[dict[str, Any]] = []
        self._last = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> list[dict[str, Any]]:
        self._thread.join(60)
        return self.events

    def _run(self) -> None:
        tries = 0
        while not self.events or "done" not in self.events[-1]:
            url = self._urls[tries % len(self._urls)] + "/v1/chat/completions"
            tries += 1
            headers = {"Content-Type": "application/json", **({"Last-Event-ID": self._last} if self._last else {})}
            request = urllib.request.Request(url, json.dumps(self._body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    self._read(response)
            except (OSError, urllib.error.URLError):
                time.sleep(0.1)

    def _read(self, lines: Any) -> None:
        id = ""
        for line in lines:
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name == "id":
                id = value
            elif name == "data" and id:  # an error has no id
                self.events.append({"done": True} if value == "[DONE]" else json.loads(value))
                self._last, id = id, ""


def content(events: list[dict[str, Any]]) -> tuple[str, Any, int]:
    choices = [choice for event in events for choice in event.get("choices", ())]
    usage = [event["usage"] for event in events if event.get("usage")]
    return "".join(choice["delta"].get("content", "") for choice in choices), usage[0]["completion_tokens"], len(usage)


async def test_streams_survive_the_death_and_the_end_of_their_router(
    model: Path, adapters: Path, tmp_path: Path, redis: str
):
    ports = [(free_port(), free_port()) for _ in range(2)]

    def start_router(number: int) -> Router:
        http, grpc = ports[number]
        flags = f"--http-port={http}", f"--grpc-port={grpc}", f"--store={redis}", "--drain-seconds=0"
        return Router(f"--shards=unix:{tmp_path}/{number}", "--move-seconds=120", *flags)

    def start_shard(number: int) -> Shard:
        address = f"--listen=unix:{tmp_path}/{number}"
        return Shard(f"--model={model}", f"--adapters={adapters}", address, "--kv-blocks=1024", "--threads=1")

    with start_shard(0), start_shard(1), start_router(0) as first, start_router(1) as second:
        for router in (first, second):
            await asyncio.to_thread(router.wait_until, "loraplex_replicas", 1, 120)
        urls = [first.url, second.url]
        async with AsyncClient(second.address) as client:
            undisturbed = dict(
                zip(STREAMS, await asyncio.gather(*(read(client, o) for o in STREAMS.values())), strict=True)
            )
        answer = content(EventSource(urls, CHAT).join())
        assert len(answer[0]) > 100 and answer[1:] == (TOKENS, 1)

        async def through(killed: Router, end: signal.Signals) -> None:
            """All streams begin at the router, which ends then."""
            begun = asyncio.Semaphore(0)
            other = second if killed is first else first
            targets = ",".join(router.address for router in (killed, other))
            async with AsyncClient(f"ipv4:{targets}", max_retries=8) as client:
                reading = [asyncio.create_task(read(client, options, begun)) for options in STREAMS.values()]
                reading.append(asyncio.create_task(read(client, {"temperature": 1.0}, begun)))
                source = EventSource([killed.url, other.url], CHAT)
                for _ in reading:
                    await begun.acquire()
                while len(source.events) < 5:
                    await asyncio.sleep(0.01)
                killed.process.send_signal(end)
                for name, pieces in zip([*STREAMS, None], await asyncio.gather(*reading), strict=True):
                    seeded = {"temperature": 1.0, "seed": pieces[-1].seed}
                    expected = undisturbed[name] if name else await read(client, seeded)
                    assert told(pieces) == told(expected), name
                assert content(await asyncio.to_thread(source.join)) == answer
            assert other.metric("loraplex_resumed_total") >= len(STREAMS)
            await asyncio.to_thread(other.assert_nothing_is_held)

        await through(first, signal.SIGKILL)
        first.kill()
        with start_router(0) as first:
            await asyncio.to_thread(first.wait_until, "loraplex_replicas", 1, 120)
            await through(second, signal.SIGTERM)
            assert await asyncio.to_thread(second.process.wait, 30) == 0


async def read(
    client: AsyncClient, options: dict[str, Any], begun: asyncio.Semaphore | None = None
) -> list[StreamPiece]:
    pieces = []
    async for piece in client.stream("The quick", **LONG, **options):
        pieces.append(piece)
        if begun is not None and len(pieces) == 5:
            begun.release()
    return pieces
