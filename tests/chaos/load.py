"""The requests of the load. Asked in peace and in chaos, each must get the same answer."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest

import pytest

from loraplex import AsyncClient, JsonSchema, LoraplexError, MergedAdapters, Prompt, Regex
from tests.chaos.cluster import LOCAL, Cluster, Place
from tests.chaos.http import post

TOKENS = 160
RETRIES = 40  # until a router has started again
CLOSE = 2e-3  # by how much numbers may differ
RED, GREEN, BLUE = LOCAL
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 60}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


class Broken(Exception):
    """A stream ended with an error after its first piece, and could not be resumed."""


@dataclass
class Said:
    """One sequence of a stream, so far."""

    pieces: list[object] = field(default_factory=list)  # tokens or text
    numbers: list[float] = field(default_factory=list)
    end: str = ""

    def add(self, pieces: list[object], end: str | None) -> None:
        assert not self.end, "more came after the end of a sequence"
        self.pieces += pieces
        self.end = end or ""


@dataclass(frozen=True)
class Answer:
    """What must be the same to the letter, and numbers that may differ in their last digits."""

    exact: tuple[object, ...]
    numbers: tuple[float, ...] = ()

    def difference(self, other: "Answer") -> str:
        """Where another answer begins to differ; empty if it does not."""
        for place, (mine, others) in enumerate(zip_longest(self.exact, other.exact)):
            if mine != others:
                return f"item {place} is {others!r}, not {mine!r}"
        return "" if other.numbers == pytest.approx(self.numbers, abs=CLOSE) else "its numbers differ"


class Clients:
    """The clients of one router."""

    _fresh = itertools.count()

    def __init__(self, cluster: Cluster, place: Place) -> None:
        self._cluster, self._http_port = cluster, place.http_port
        self.grpc = AsyncClient(f"127.0.0.1:{place.grpc_port}", max_retries=RETRIES)

    def post(self, path: str, body: object) -> AsyncIterator[dict[str, object]]:
        return post(self._http_port, path, body)

    def push_to_hub(self) -> str:
        """Pushes an adapter that no router or shard has seen, with the weights of RED."""
        number = next(self._fresh)
        self._cluster.hub.push(f"fresh/{number}", self._files(RED, number))
        return f"fresh/{number}"

    def push_to_bucket(self) -> str:
        number = next(self._fresh)
        self._cluster.bucket.push(f"bucket/fresh/{number}", self._files(RED, number))
        return f"s3://bucket/fresh/{number}"

    async def upload(self, local: str, name: str = "") -> str:
        """Uploads an adapter with the weights of a local one, under a name of its own or as a name's next version."""
        number = next(self._fresh)
        name = name or f"uploaded-{number}"
        await self.grpc.upload_adapter(name, self._files(local, number))
        return name

    def _files(self, local: str, number: int) -> dict[str, bytes]:
        folder = self._cluster.folder / "adapters" / local
        config = json.loads((folder / "adapter_config.json").read_bytes()) | {"revision": f"{number}"}
        weights = (folder / "adapter_model.safetensors").read_bytes()
        return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}


Ask = Callable[[Clients], Awaitable[Answer]]


def streamed(
    prompt: Prompt,
    *,
    push: Callable[[Clients], str] | None = None,
    begun: asyncio.Event | None = None,
    **options: object,
) -> Ask:
    """A stream over gRPC. `push`: brings an adapter that was never asked for. `begun` is set when something has
    arrived."""

    async def ask(clients: Clients) -> Answer:
        adapter = {"adapter": push(clients)} if push else {}
        given = {"max_new_tokens": TOKENS, "ignore_eos": True, **options, **adapter}
        said: dict[int, Said] = {}
        try:
            async for piece in clients.grpc.stream(prompt, **given):
                if begun:
                    begun.set()
                sequence = said.setdefault(piece.index, Said())
                sequence.add([token.id for token in piece.tokens], piece.finish_reason)
                for token in piece.tokens:
                    if token.logprob is not None:
                        sequence.numbers += [token.logprob, *(other.logprob for other in token.alternatives)]
        except LoraplexError as error:
            raise Broken(error) if said else error from error
        return answer(said)

    return ask


def completed(**options: object) -> Ask:
    """OpenAI's completions, streamed over HTTP."""

    async def ask(clients: Clients) -> Answer:
        given = {"max_tokens": TOKENS, "model": RED, "prompt": "Over HTTP", "temperature": 0, "ignore_eos": True}
        said: dict[int, Said] = {}
        try:
            async for chunk in clients.post("/v1/completions", {**given, "stream": True, **options}):
                for choice in chunk["choices"]:
                    said.setdefault(choice["index"], Said()).add([*choice["text"]], choice["finish_reason"])
        except LoraplexError as error:
            raise Broken(error) if said else error from error
        return answer(said)

    return ask


def answer(said: dict[int, Said]) -> Answer:
    sequences = [said[index] for index in sorted(said)]
    assert sequences and all(sequence.end for sequence in sequences), "a sequence has no end"
    exact = tuple(item for sequence in sequences for item in (*sequence.pieces, sequence.end))
    return Answer(exact, tuple(number for sequence in sequences for number in sequence.numbers))


async def chatted(clients: Clients) -> Answer:
    """OpenAI's chat, as a whole, in JSON."""
    format = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    messages = [{"role": "user", "content": "A thing"}]
    body = {"model": GREEN, "messages": messages, "response_format": format, "max_tokens": TOKENS, "seed": 4}
    async for found in clients.post("/v1/chat/completions", body):
        choice = found["choices"][0]
    return Answer((choice["message"]["content"], choice["finish_reason"]))


def embedded(adapter: str | None) -> Ask:
    async def ask(clients: Clients) -> Answer:
        found = await clients.grpc.embed(["some text", "and " * 300], adapter=adapter)
        return Answer((len(found),), tuple(value for embedding in found for value in embedding.values))

    return ask


async def replaced(clients: Clients) -> Answer:
    """A stream with an adapter, a newer version of which is uploaded meanwhile, and one with that."""
    name = await clients.upload(RED)
    try:
        begun = asyncio.Event()
        former = asyncio.create_task(streamed("Once upon a time", begun=begun, adapter=name)(clients))
        former.add_done_callback(lambda _: begun.set())
        try:
            await begun.wait()
            await clients.upload(BLUE, name)
        finally:
            first = await former
        second = await streamed("Once upon a time", adapter=name)(clients)
    finally:
        with suppress(LoraplexError):
            await clients.grpc.remove_adapter(name)
    return Answer((*first.exact, *second.exact))


CASES: dict[str, Ask] = {
    "greedy": streamed("Once upon a time"),
    "greedy, with an adapter": streamed("Once upon a time", adapter=RED),
    "greedy, after a long prompt": streamed("A long story. " * 60, adapter=GREEN),
    "sampled": streamed("Once", temperature=1.0, seed=7, top_p=0.95, adapter=BLUE),
    "penalized": streamed("Twice", temperature=0.8, seed=8, repetition_penalty=1.2, frequency_penalty=0.3),
    "a schema": streamed("JSON:", grammar=JsonSchema(SCHEMA), temperature=1.0, seed=9, adapter=GREEN),
    "a regex": streamed("letters", grammar=Regex("[a-z ]{100,120}"), temperature=1.0, seed=10),
    "log probabilities": streamed("Likely", top_logprobs=3, adapter=BLUE),
    "three answers": streamed("Three", n=3, temperature=1.0, seed=11, adapter=RED),
    "a stop text": streamed("Stop", stop=["e", "xyz"], temperature=1.0, seed=12),
    "several adapters": streamed("Which?", adapters=[None, *LOCAL]),
    "merged": streamed("Both", adapter=MergedAdapters([RED, BLUE], [0.5, 0.5])),
    "a new adapter of the hub": streamed("Once upon a time", push=Clients.push_to_hub),
    "a new adapter of a bucket": streamed("Once upon a time", push=Clients.push_to_bucket),
    "an uploaded adapter, which is replaced": replaced,
    "embeddings": embedded(None),
    "embeddings, with an adapter": embedded(GREEN),
    "completions": completed(),
    "completions, sampled": completed(temperature=1.0, seed=13, n=2, stop=["~~"]),
    "a chat in JSON": chatted,
}
