"""Huge requests are refused, other requests continue, and the router needs little memory."""

import http.client
import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from loraplex import Client
from loraplex_protos import generation_pb2 as pb
from loraplex_protos.generation_pb2_grpc import GenerationServiceStub
from tests.e2e.processes import Server

MAX_MIB = 200  # by which the router's memory may grow
MIB = 2**20


def memory(server: Server, name: str) -> int:
    """The router's memory in MiB: VmRSS is the current value, VmHWM the peak."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    assert found
    return int(found.group(1)) // 1024


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with Server(str(model), "--kv-blocks=512", "--threads=1") as running:
        post(running, "/v1/chat/completions", chat([{"role": "user", "content": "Hi"}]))
        before = memory(running, "VmRSS")
        yield running
        assert memory(running, "VmHWM") - before < MAX_MIB
        status, answer = post(running, "/generate", json.dumps({"inputs": "Hi", "parameters": {"max_new_tokens": 2}}))
        assert status == 200 and json.loads(answer)["generated_text"]
        running.assert_nothing_is_held()


def post(server: Server, path: str, body: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
    try:
        connection.request("POST", path, body.encode(), {"Content-Type": "application/json", **headers})
        with connection.getresponse() as response:
            return response.status, response.read()
    finally:
        connection.close()


def chat(messages: list[object], **fields: object) -> str:
    return json.dumps({"messages": messages, "max_tokens": 1, **fields})


def many(value: str, count: int) -> str:
    return "[" + ",".join([value] * count) + "]"


USER = {"role": "user", "content": "Hi"}
DEEP = "[" * 100_000
FLOODS = {
    "12 MB of wrong ids": ("/v1/completions", f'{{"prompt": {many("-1", 4_000_000)}}}'),
    "wrong ids within the limit": ("/v1/completions", f'{{"prompt": {many("-1", 200_000)}}}'),
    "ids beyond the context": ("/v1/completions", f'{{"prompt": {many("1", 200_000)}}}'),
    "lists of ids": ("/v1/embeddings", f'{{"input": {many("[]", 1_000_000)}}}'),
    "ids without a text": ("/detokenize", f'{{"tokens": {many("999999", 200_000)}}}'),
    "too many inputs": ("/v1/embeddings", f'{{"input": {many("[1]", 5000)}}}'),
    "deep JSON": ("/v1/chat/completions", f'{{"messages": {DEEP}'),
    "a deep schema": (
        "/v1/chat/completions",
        chat([USER], tools=[{"type": "function", "function": {"name": "f", "parameters": 0}}]).replace(
            '"parameters": 0', '"parameters": ' + '{"a":' * 1000 + "1" + "}" * 1000
        ),
    ),
    "deep arguments": (
        "/v1/chat/completions",
        chat([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}]),
    ),
    "a guided_json of depth": ("/v1/completions", json.dumps({"prompt": "Hi", "guided_json": DEEP[:30_000]})),
    "15 MB of text": ("/generate", json.dumps({"inputs": "word " * 3_000_000})),
    "7 MB of text": ("/generate", json.dumps({"inputs": "word " * 1_400_000})),
    "7 MB of blanks": ("/generate", json.dumps({"inputs": " " * 7_000_000})),
    "a long text that is wide": (
        "/generate",
        json.dumps({"inputs": "a" * 7_000_000 + "\U0001f600"}, ensure_ascii=False),
    ),
    "a chat of 7 MB": ("/v1/chat/completions", chat([{"role": "user", "content": "word " * 1_400_000}])),
    "20,000 messages": ("/v1/chat/completions", chat([USER] * 20_000)),
    "10,000 parts": ("/v1/chat/completions", chat([{"role": "user", "content": [{"type": "?"}] * 10_000}])),
    "a million biases": (
        "/v1/completions",
        '{"prompt": "Hi", "logit_bias": {' + ",".join(f'"{token}":1' for token in range(500_000)) + "}}",
    ),
    "biases within the limit": (
        "/v1/completions",
        '{"prompt": "Hi", "logit_bias": {' + ",".join(f'"{token}":1' for token in range(10_000)) + "}}",
    ),
    "many stops": ("/v1/completions", json.dumps({"prompt": "Hi", "stop": ["x"] * 100_000})),
    "a long model": ("/v1/completions", json.dumps({"prompt": "Hi", "model": "m" * 5_000_000})),
    "a long adapter": ("/generate", json.dumps({"inputs": "Hi", "parameters": {"adapter_id": "a" * 5_000_000}})),
    "a long tool choice": (
        "/v1/chat/completions",
        chat([USER], tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="t" * 5_000_000),
    ),
    "a long name to load": ("/v1/load_lora_adapter", json.dumps({"lora_name": "l" * 5_000_000, "lora_path": "x"})),
    "a long key of a bias": ("/v1/completions", json.dumps({"prompt": "Hi", "logit_bias": {"k" * 5_000_000: 1}})),
    "logprobs of all answers": (
        "/v1/completions",
        json.dumps({"prompt": "Hi", "n": 64, "logprobs": 20, "max_tokens": 4000}),
    ),
    "no JSON": ("/generate", '"' + "x" * 5_000_000),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_too_large_requests_are_refused_with_short_errors(server: Server, flood: str):
    status, answer = post(server, *FLOODS[flood])
    assert status in (400, 404, 413, 422)
    assert len(answer) < 4000


def test_a_text_of_4_mb_is_tokenized(server: Server):
    text = "word " * 800_000
    status, answer = post(server, "/tokenize", json.dumps({"prompt": text}))
    tokens = json.loads(answer)
    assert status == 200 and tokens["count"] == len(tokens["tokens"]) == len(text)


def test_a_compressed_body_is_not_read(server: Server):
    assert post(server, "/generate", "x", **{"Content-Encoding": "gzip"})[0] == 415


GRPC_FLOODS = {
    "messages": pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 1_000_000)),
    "stops": pb.GenerateRequest(text="Hi", stopping=pb.Stopping(stop=[""] * 1_000_000)),
    "ids": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 7_000_000)),
    "text": pb.GenerateRequest(text="word " * 1_400_000),
    "too large": pb.GenerateRequest(text="word " * 3_000_000),
    "a long name": pb.GenerateRequest(text="Hi", adapter=pb.AdapterReference(id="\n" * 1_000_000)),
    "a long role": pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="é" * 1_000_000)])),
}


@pytest.mark.parametrize("flood", GRPC_FLOODS)
def test_too_large_grpc_requests_are_refused_with_short_errors(server: Server, flood: str):
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        GenerationServiceStub(channel).Generate(GRPC_FLOODS[flood], timeout=120)
    codes = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.code() in codes and len(caught.value.details()) < 2000


def test_a_grpc_message_is_not_decompressed(server: Server):
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        bomb = pb.GenerateRequest(text="\0" * (64 * MIB))
        GenerationServiceStub(channel).Generate(bomb, timeout=120, compression=grpc.Compression.Gzip)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_streams_that_nobody_reads_cost_little_memory_and_delay_no_others(server: Server):
    body = {"prompt": "Hi", "stream": True, "n": 4, "max_tokens": 200, "logprobs": 5, "ignore_eos": True}
    content = json.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n{content}".encode()
    asked = pb.GenerateRequest(text="Hi", n=4)
    asked.stopping.max_new_tokens, asked.stopping.ignore_eos = 200, True
    with ExitStack() as held:
        for _ in range(8):
            unread = held.enter_context(socket.socket())
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            unread.sendall(request)
            channel = held.enter_context(grpc.insecure_channel(server.address))
            held.callback(GenerationServiceStub(channel).GenerateStream(asked).cancel)
        with Client(server.address) as client:
            pieces = list(client.stream("Hi", max_new_tokens=30, ignore_eos=True))
        assert sum(len(piece.tokens) for piece in pieces) == 30
        server.wait_until('loraplex_sequences{state="running"}', 0, 60)  # nothing waits for them to be read
